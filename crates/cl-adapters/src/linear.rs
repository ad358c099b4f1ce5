use cl_checkpoint::LayerKind;
use cl_torch::tch::{Kind, Tensor};
use cl_torch::{LinearLayer, LowRank, linears};

use crate::{Lora, LoraMixture, Magnitude, Mode, Site, TokenRows, Weight};

/// A linear layer `y = x·Wᵀ + b`, with or without an adapter.
pub struct Linear {
    /// Name of the module, as in the checkpoint, without `.weight`.
    pub name: String,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// The trained low-rank update.
    pub lora: Option<Lora>,
    /// Frozen low-rank updates: adapters of earlier rounds, and the subtracted initialization of the adapter.
    pub frozen: Vec<Frozen>,
    /// A mixture of low-rank updates, weighted by a router for each token.
    pub mixture: Option<LoraMixture>,
    /// Rows of the weight that are trained and replace its own; only in the output head.
    pub rows: Option<TokenRows>,
    /// Dtype of the adapters' products; defaults to the dtype of `x`.
    ///
    /// PEFT keeps the factors in f32. Without autocast, it also computes their products in f32 if the weight is bf16;
    /// the sum with the layer's output is then rounded once.
    pub adapter_kind: Option<Kind>,
}

/// A frozen low-rank update: `ΔW = scaling · B·A`.
pub struct Frozen {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// The factor by which `B·A` is multiplied.
    pub scaling: f64,
    /// Whether this update subtracts the initial value of the layer's adapter, as in PiSSA; it is then saved as part of
    /// the adapter.
    pub is_init_offset: bool,
}

impl Frozen {
    /// Computes `scaling · x·Aᵀ`, `[tokens, r]` in the dtype `kind`.
    pub fn project_down(&self, x: &Tensor, kind: Kind) -> Tensor {
        cl_torch::linear(&x.to_kind(kind), &self.a.to_kind(kind), None) * self.scaling
    }

    fn shallow_clone(&self) -> Frozen {
        Frozen { a: self.a.shallow_clone(), b: self.b.shallow_clone(), ..*self }
    }
}

/// Weight, bias and factors of a layer, converted to the dtype of its input.
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
    /// Creates a layer without an adapter.
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

    /// Returns the widths `(in, out)`.
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

    /// Computes [`Linear::forward`] for several layers with the same input; their products form one autograd node.
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

    /// Whether the adapter's products can be fused with that of the weight, which requires the same dtype and input.
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

    /// Adds the trained update to the layer's product `y`, or the part of it that is not already included.
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

    /// Adds frozen updates, the mixture and trained rows, and converts the result to the dtype of `x`.
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

    /// The output with DoRA, in the dtype of the adapters' products.
    fn with_magnitude(&self, lora: &Lora, x: &Tensor, mode: Mode) -> Tensor {
        let magnitude = lora.magnitude.as_ref().expect("asked for by the caller");
        magnitude.forward(&self.weight, self.bias.as_ref(), lora, x, self.adapter_kind.unwrap_or(x.kind()), mode)
    }

    /// Makes the rows of these tokens trainable, starting from the given values or from the weight's. Only for the
    /// output head, which is never quantized.
    ///
    /// # Panics
    /// Panics if an id is not that of a token.
    pub fn set_rows(&mut self, ids: &[i64], values: Option<Tensor>) {
        self.rows = self.weight.dense().map(|weight| TokenRows::new(weight, ids, values));
    }

    /// Returns the layer as one that can have an adapter.
    pub fn site(&self) -> Site<'_> {
        let start = self.frozen.iter().find(|f| f.is_init_offset);
        Site { name: &self.name, kind: LayerKind::Linear, lora: self.lora.as_ref(), start }
    }

    /// Returns a second handle to the same tensors.
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
