use cl_adapters::{Linear, Mode};
use cl_torch::tch::Tensor;

/// SwiGLU (Shazeer, arXiv:2002.05202): `down(silu(gate(x)) · up(x))`.
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl Mlp {
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let gated = self.gate_proj.forward(x, mode).silu() * self.up_proj.forward(x, mode);
        self.down_proj.forward(&gated, mode)
    }

    pub(crate) fn shallow_clone(&self) -> Mlp {
        Mlp {
            gate_proj: self.gate_proj.shallow_clone(),
            up_proj: self.up_proj.shallow_clone(),
            down_proj: self.down_proj.shallow_clone(),
        }
    }
}
