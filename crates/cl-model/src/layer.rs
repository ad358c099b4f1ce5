use cl_adapters::{Linear, Mode};
use cl_torch::tch::Tensor;

use crate::attention::Attention;
use crate::mlp::Mlp;
use crate::norm::RmsNorm;
use crate::rope::Angles;

/// One decoder layer: attention and MLP, each behind a norm and added to the residual stream.
pub(crate) struct Layer {
    pub(crate) input_layernorm: RmsNorm,
    pub(crate) self_attn: Attention,
    pub(crate) post_attention_layernorm: RmsNorm,
    pub(crate) mlp: Mlp,
}

impl Layer {
    /// `x` `(tokens, hidden)` in, `(tokens, hidden)` out; see [`Attention::forward`] for `attend`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        mode: Mode,
        attend: &mut dyn FnMut(Tensor, Tensor, Tensor, Option<i64>) -> Tensor,
    ) -> Tensor {
        let x = x + self.self_attn.forward(&self.input_layernorm.forward(x), angles, mode, attend);
        &x + self.mlp.forward(&self.post_attention_layernorm.forward(&x), mode)
    }

    pub(crate) fn linears(&self) -> [&Linear; 7] {
        let (a, m) = (&self.self_attn, &self.mlp);
        [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj, &m.gate_proj, &m.up_proj, &m.down_proj]
    }

    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        [&mut a.q_proj, &mut a.k_proj, &mut a.v_proj, &mut a.o_proj, &mut m.gate_proj, &mut m.up_proj, &mut m.down_proj]
    }

    /// A norm by the end of its name.
    pub(crate) fn norm_mut(&mut self, name: &str) -> Option<&mut RmsNorm> {
        match name {
            "input_layernorm" => Some(&mut self.input_layernorm),
            "post_attention_layernorm" => Some(&mut self.post_attention_layernorm),
            "self_attn.q_norm" => self.self_attn.q_norm.as_mut(),
            "self_attn.k_norm" => self.self_attn.k_norm.as_mut(),
            _ => None,
        }
    }

    pub(crate) fn shallow_clone(&self) -> Layer {
        Layer {
            input_layernorm: self.input_layernorm.shallow_clone(),
            self_attn: self.self_attn.shallow_clone(),
            post_attention_layernorm: self.post_attention_layernorm.shallow_clone(),
            mlp: self.mlp.shallow_clone(),
        }
    }
}
