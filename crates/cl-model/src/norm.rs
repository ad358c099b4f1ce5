use cl_torch::rms_norm;
use cl_torch::tch::{Kind, Tensor};

use crate::config::{Family, ModelConfig};

/// Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv:1910.07467):
/// `weight · x / √(mean(x²) + eps)`, with the division in f32.
pub(crate) struct RmsNorm {
    pub(crate) name: String,   // in the checkpoint, without `.weight`
    pub(crate) weight: Tensor, // (width)
    pub(crate) eps: f64,
    pub(crate) form: NormForm,
}

/// Differences between the families' norms.
#[derive(Clone, Copy)]
pub(crate) struct NormForm {
    /// Whether the weight is stored as an offset from 1.
    offset: bool,
    /// Whether the product with the weight is computed in f32 too, instead of the dtype of the activations.
    wide_product: bool,
}

impl NormForm {
    pub(crate) fn of(config: &ModelConfig) -> NormForm {
        NormForm { offset: config.norm_offset, wide_product: config.norm_offset || config.family == Family::Olmo2 }
    }
}

impl RmsNorm {
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let product_kind = if self.form.wide_product { Kind::Float } else { x.kind() };
        rms_norm(x, &self.scale(product_kind), self.eps)
    }

    fn scale(&self, kind: Kind) -> Tensor {
        let weight = self.weight.to_kind(kind);
        if self.form.offset { weight + 1.0 } else { weight }
    }

    pub(crate) fn shallow_clone(&self) -> RmsNorm {
        RmsNorm { name: self.name.clone(), weight: self.weight.shallow_clone(), eps: self.eps, form: self.form }
    }
}
