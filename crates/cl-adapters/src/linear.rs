use cl_checkpoint::LayerKind;
use cl_torch::tch::Tensor;

use crate::{Lora, Mode, Site};

/// A linear layer `y = x·Wᵀ + b`, with or without an adapter.
pub struct Linear {
    /// Name of the module, as the checkpoint has it without `.weight`.
    pub name: String,
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// The low-rank update beside the weight.
    pub lora: Option<Lora>,
    /// Low-rank updates beside it that do not learn: adapters of earlier rounds, and what the adapter's start is less.
    pub frozen: Vec<Frozen>,
}

/// A low-rank update that does not learn: `ΔW = scaling · B·A`.
pub struct Frozen {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// The factor in front of `B·A`.
    pub scaling: f64,
    /// Whether it takes the start of the layer's adapter out of the weight, as PiSSA does: part of the adapter when that is
    /// saved.
    pub of_start: bool,
}

impl Frozen {
    /// `scaling · x·Aᵀ`, `[tokens, r]` in the dtype of `x`.
    pub fn narrow(&self, x: &Tensor) -> Tensor {
        x.linear::<&Tensor>(&self.a.to_kind(x.kind()), None) * self.scaling
    }

    fn shallow_clone(&self) -> Frozen {
        Frozen { a: self.a.shallow_clone(), b: self.b.shallow_clone(), ..*self }
    }
}

impl Linear {
    /// A layer without an adapter.
    pub fn new(name: &str, weight: Tensor, bias: Option<Tensor>) -> Linear {
        Linear { name: name.to_owned(), weight, bias, lora: None, frozen: Vec::new() }
    }

    /// `(in, out)`.
    pub fn widths(&self) -> (i64, i64) {
        let (output, input) = self.weight.size2().expect("a linear layer's weight is a matrix");
        (input, output)
    }

    /// `x` is `[tokens, in]`; the result is `[tokens, out]` in the dtype of `x`.
    ///
    /// Weights kept in another dtype (f32 master weights under bf16 compute) are converted on the way, so that their
    /// gradients arrive in the dtype they are kept in.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let kind = x.kind();
        let mut y = match &self.lora {
            Some(Lora { magnitude: Some(magnitude), .. }) => {
                let lora = self.lora.as_ref().expect("matched above");
                magnitude.forward(&self.weight, self.bias.as_ref(), lora, x, mode)
            }
            lora => {
                let bias = self.bias.as_ref().map(|b| b.to_kind(kind));
                let y = mode.linear(x, &self.weight.to_kind(kind), bias.as_ref());
                lora.as_ref().map_or_else(|| y.shallow_clone(), |lora| lora.add_to(y.shallow_clone(), x, mode))
            }
        };
        for frozen in &self.frozen {
            y = y.addmm_(&frozen.narrow(x), &frozen.b.to_kind(kind).tr());
        }
        y
    }

    /// The layer as a place for an adapter.
    pub fn site(&self) -> Site<'_> {
        let start = self.frozen.iter().find(|f| f.of_start);
        Site { name: &self.name, kind: LayerKind::Linear, lora: self.lora.as_ref(), start }
    }

    /// Another handle on the same tensors.
    pub fn shallow_clone(&self) -> Linear {
        Linear {
            name: self.name.clone(),
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            lora: self.lora.as_ref().map(Lora::shallow_clone),
            frozen: self.frozen.iter().map(Frozen::shallow_clone).collect(),
        }
    }
}
