use super::keys::{DEFAULTS, Keys};
use super::{Family, ModelConfig};
use crate::problem::ConfigProblem;

/// Llama 1–3 and models with the same architecture.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let bias = keys.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: keys.mlp_bias.unwrap_or(false),
        ..keys.config(Family::Llama, &DEFAULTS)?
    })
}
