use super::keys::{DEFAULTS, Defaults, Keys};
use super::{Family, ModelConfig, qwen};
use crate::problem::ConfigProblem;

/// SmolLM3: every fourth layer has no rotary position embeddings.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(4), rope_theta: 2e6, tie_word_embeddings: true, ..DEFAULTS };
    let bias = keys.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: keys.mlp_bias.unwrap_or(false),
        windows: qwen::late_windows(keys)?,
        uses_rope: uses_rope(keys)?,
        ..keys.config(Family::SmolLm3, &defaults)?
    })
}

fn uses_rope(keys: &Keys) -> Result<Vec<bool>, ConfigProblem> {
    let n = keys.num_hidden_layers;
    match &keys.no_rope_layers {
        Some(flags) if flags.len() != n => {
            Err(ConfigProblem::LayerCount { key: "no_rope_layers", entries: flags.len(), layers: n })
        }
        // Contrary to the name of the key, 1 marks the layers that use rotary positions.
        Some(flags) => Ok(flags.iter().map(|&f| f != 0).collect()),
        None => {
            let interval = keys.no_rope_layer_interval.unwrap_or(4).max(1);
            Ok((0..n).map(|i| (i + 1) % interval != 0).collect())
        }
    }
}
