use cl_checkpoint::LayerKind;
use cl_torch::tch::{Kind, Tensor};
use cl_torch::{LinearLayer, LowRank, linears};

use crate::{Lora, LoraMixture, Magnitude, Mode, Site, TokenRows, Weight};

/// A linear layer `y = x·Wᵀ + b`, with or without an adapter.
pub struct Linear {
    /// Name of the module, as in the checkpoint without `.weight`.
    pub name: String,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// The low-rank update.
    pub lora: Option<Lora>,
    /// Frozen low-rank updates: adapters of earlier rounds, and the subtracted initialization of the adapter.
    pub frozen: Vec<Frozen>,
    /// Low-rank updates weighted by a router for each token.
    pub mixture: Option<LoraMixture>,
    /// Rows of the weight that are trained and replace its own; only in the output head.
    pub rows: Option<TokenRows>,
    /// Dtype of the adapters' products; defaults to that of `x`.
    ///
    /// PEFT keeps the factors in f32, and without autocast also computes products in f32 with a bf16 weight: the sum
    /// with the layer's output is rounded once.
    pub adapter_kind: Option<Kind>,
}

/// A frozen low-rank update: `ΔW = scaling · B·A`.
pub struct Frozen {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// The scaling of `B·A`.
    pub scaling: f64,
    /// Whether it subtracts the initial value of the layer's adapter from the weight, as in PiSSA; it is then saved as
    /// part of the adapter.
    pub is_init_offset: bool,
}

impl Frozen {
    /// `scaling · x·Aᵀ`, `[tokens, r]` in the dtype `kind`.
    pub fn project_down(&self, x: &Tensor, kind: Kind) -> Tensor {
        cl_torch::linear(&x.to_kind(kind), &self.a.to_kind(kind), None) * self.scaling
    }

    fn shallow_clone(&self) -> Frozen {
        Frozen { a: self.a.shallow_clone(), b: self.b.shallow_clone(), ..*self }
    }
}

/// What a layer is multiplied by, in the dtype of its input.
struct Operands {
    weight: Weight,
    bias: Option<Tensor>,
    low_rank: Option<(Tensor, Tensor, f64)>,
}

impl Operands {
    fn layer(&self) -> LinearLayer<'_> {
        let low_rank = self.low_rank.as_ref().map(|(a, b, scaling)| LowRank { a, b, scaling: *scaling });
        LinearLayer { weight: self.weight.as_argument(), bias: self.bias.as_ref(), low_rank }
    }
}

impl Linear {
    /// A layer without an adapter.
    pub fn new(name: &str, weight: impl Into<Weight>, bias: Option<Tensor>) -> Linear {
        Linear {
            name: name.to_owned(),
            weight: weight.into(),
            bias,
            lora: None,
            frozen: Vec::new(),
            mixture: None,
            rows: None,
            adapter_kind: None,
        }
    }

    /// `(in, out)`.
    pub fn widths(&self) -> (i64, i64) {
        let [output, input] = self.weight.shape();
        (input, output)
    }

    /// Maps `x` `[tokens, in]` to `[tokens, out]` in the dtype of `x`.
    ///
    /// Weights in another dtype (f32 master weights with bf16 computation) are converted in the forward pass, so that
    /// their gradients have the dtype of the weights.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        Linear::forward_all(&[self], x, mode).pop().expect("one output a layer")
    }

    /// [`Linear::forward`] for several layers with the same input, with their products as one node of the graph.
    pub fn forward_all(layers: &[&Linear], x: &Tensor, mode: Mode) -> Vec<Tensor> {
        if layers.iter().any(|l| l.magnitude().is_some()) {
            return layers.iter().map(|l| l.finished(l.alone(x, mode), x, mode)).collect();
        }
        let operands: Vec<Operands> = layers.iter().map(|l| l.operands(x.kind(), mode)).collect();
        let products: Vec<LinearLayer<'_>> = operands.iter().map(Operands::layer).collect();
        let outputs = layers.iter().zip(linears(x, &products));
        outputs.map(|(l, y)| l.finished(l.with_update(y, x, mode), x, mode)).collect()
    }

    fn magnitude(&self) -> Option<&Magnitude> {
        self.lora.as_ref()?.magnitude.as_ref()
    }

    /// Whether the adapter's factors can be multiplied together with the weight: in one dtype and from one input.
    fn fuses(&self, kind: Kind, mode: Mode) -> bool {
        let same_input = |lora: &Lora| mode == Mode::Eval || lora.dropout == 0.0;
        self.lora.as_ref().is_some_and(same_input) && self.adapter_kind.unwrap_or(kind) == kind
    }

    fn operands(&self, kind: Kind, mode: Mode) -> Operands {
        let fused = self.lora.as_ref().filter(|_| self.fuses(kind, mode));
        Operands {
            weight: self.weight.operand(kind),
            bias: self.bias.as_ref().map(|b| b.to_kind(kind)),
            low_rank: fused.map(|lora| (lora.a.to_kind(kind), lora.b.to_kind(kind), lora.scaling)),
        }
    }

    /// The layer's product with its learning update, as far as that is not in `y` already.
    fn with_update(&self, y: Tensor, x: &Tensor, mode: Mode) -> Tensor {
        let y = y.to_kind(self.adapter_kind.unwrap_or(x.kind()));
        match &self.lora {
            Some(lora) if self.fuses(x.kind(), mode) => lora.add_bias(y),
            Some(lora) => lora.add_to(y, x, mode),
            None => y,
        }
    }

    fn alone(&self, x: &Tensor, mode: Mode) -> Tensor {
        match self.magnitude() {
            Some(_) => self.with_magnitude(self.lora.as_ref().expect("it has a magnitude"), x, mode),
            None => {
                let operands = self.operands(x.kind(), mode);
                let y = linears(x, &[operands.layer()]).pop().expect("one output a layer");
                self.with_update(y, x, mode)
            }
        }
    }

    /// What comes after the weight and its learning update, in the dtype of `x`.
    fn finished(&self, mut y: Tensor, x: &Tensor, mode: Mode) -> Tensor {
        let (kind, adapters) = (x.kind(), self.adapter_kind.unwrap_or(x.kind()));
        for frozen in &self.frozen {
            y = y.addmm_(&frozen.project_down(x, adapters), &frozen.b.to_kind(adapters).tr());
        }
        if let Some(mixture) = &self.mixture {
            y = mixture.add_to(y, x, mode);
        }
        let y = y.to_kind(kind);
        match &self.rows {
            Some(rows) => y.index_copy(-1, rows.places(), &rows.logits(x)),
            None => y,
        }
    }

    /// DoRA's output, in the dtype of the adapters' products.
    fn with_magnitude(&self, lora: &Lora, x: &Tensor, mode: Mode) -> Tensor {
        let magnitude = lora.magnitude.as_ref().expect("asked for by the caller");
        magnitude.forward(&self.weight, self.bias.as_ref(), lora, x, self.adapter_kind.unwrap_or(x.kind()), mode)
    }

    /// Makes the rows of these tokens trainable, with the given values or copies of the weight's; only in the output head,
    /// which is never quantized.
    pub fn set_rows(&mut self, ids: &[i64], values: Option<Tensor>) {
        self.rows = self.weight.dense().map(|weight| TokenRows::new(weight, ids, values));
    }

    /// The layer as a place for an adapter.
    pub fn site(&self) -> Site<'_> {
        let start = self.frozen.iter().find(|f| f.is_init_offset);
        Site { name: &self.name, kind: LayerKind::Linear, lora: self.lora.as_ref(), start }
    }

    /// A second handle to the same tensors.
    pub fn shallow_clone(&self) -> Linear {
        Linear {
            name: self.name.clone(),
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            lora: self.lora.as_ref().map(Lora::shallow_clone),
            frozen: self.frozen.iter().map(Frozen::shallow_clone).collect(),
            mixture: self.mixture.as_ref().map(LoraMixture::shallow_clone),
            rows: self.rows.as_ref().map(TokenRows::shallow_clone),
            adapter_kind: self.adapter_kind,
        }
    }
}
