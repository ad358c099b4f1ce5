use cl_torch::tch::{Kind, Tensor};

/// Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv:1910.07467):
/// `weight · x / √(mean(x²) + eps)`, with the division in f32 and the product in the dtype of `x`.
pub(crate) struct RmsNorm {
    pub(crate) weight: Tensor, // (width)
    pub(crate) eps: f64,
}

impl RmsNorm {
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let weight = self.weight.to_kind(kind);
        if kind == Kind::Float {
            return x.internal_fused_rms_norm(weight.size(), Some(&weight), self.eps).0;
        }
        let wide = x.to_kind(Kind::Float);
        let mean_square = (&wide * &wide).mean_dim(-1, true, Kind::Float);
        let normed: Tensor = wide * (mean_square + self.eps).rsqrt();
        normed.to_kind(kind) * weight
    }

    pub(crate) fn shallow_clone(&self) -> RmsNorm {
        RmsNorm { weight: self.weight.shallow_clone(), eps: self.eps }
    }
}
