use super::keys::{DEFAULTS, Keys};
use super::{Family, ModelConfig};
use crate::problem::ConfigProblem;

/// Granite 3: Llama with multipliers on embeddings, attention scores, residual branches and logits.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let bias = keys.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: keys.mlp_bias.unwrap_or(false),
        attention_multiplier: Some(keys.attention_multiplier.unwrap_or(1.0)),
        embedding_multiplier: keys.embedding_multiplier.unwrap_or(1.0),
        residual_multiplier: keys.residual_multiplier.unwrap_or(1.0),
        logits_scaling: keys.logits_scaling.unwrap_or(1.0),
        ..keys.config(Family::Granite, &DEFAULTS)?
    })
}
