use super::keys::{DEFAULTS, Defaults, Keys};
use super::{Family, ModelConfig};
use crate::problem::ConfigProblem;

/// Seed-OSS: Llama with biases on q, k and v; a separate key determines whether o has one.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults =
        Defaults { num_key_value_heads: Some(8), head_dim: Some(128), max_position_embeddings: 524_288, ..DEFAULTS };
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: keys.attention_bias.unwrap_or(true),
        o_bias: keys.attention_out_bias.unwrap_or(false),
        mlp_bias: keys.mlp_bias.unwrap_or(false),
        ..keys.config(Family::SeedOss, &defaults)?
    })
}
