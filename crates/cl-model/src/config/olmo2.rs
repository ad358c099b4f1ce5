use super::keys::{DEFAULTS, Defaults, Keys};
use super::{Family, ModelConfig, NormPlacement, QkNorm};
use crate::problem::ConfigProblem;

/// OLMo 2 (arXiv:2501.00656): norms after attention and MLP, and over all heads of q and of k together.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let bias = keys.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        norms: NormPlacement::Post,
        qk_norm: QkNorm::Whole,
        qkv_bias: bias,
        o_bias: bias,
        ..keys.config(Family::Olmo2, &Defaults { rms_norm_eps: 1e-5, ..DEFAULTS })?
    })
}
