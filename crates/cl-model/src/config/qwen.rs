use super::keys::{DEFAULTS, Defaults, Keys};
use super::{Family, ModelConfig, QkNorm};
use crate::problem::ConfigProblem;

/// Qwen2 and Qwen2.5: biases on q, k and v.
pub(super) fn read_qwen2(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(32), ..DEFAULTS };
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: true,
        windows: late_windows(keys)?,
        ..keys.config(Family::Qwen2, &defaults)?
    })
}

/// Qwen3: norms on each head of q and k.
pub(super) fn read_qwen3(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(32), head_dim: Some(128), ..DEFAULTS };
    let bias = keys.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::Head,
        windows: late_windows(keys)?,
        ..keys.config(Family::Qwen3, &defaults)?
    })
}

/// The window applies only with `use_sliding_window`, and the first `max_window_layers` layers keep full attention.
pub(super) fn late_windows(keys: &Keys) -> Result<Vec<Option<i64>>, ConfigProblem> {
    let window = keys.sliding_window.unwrap_or(Some(4096)).filter(|_| keys.use_sliding_window.unwrap_or(false));
    let first = keys.max_window_layers.unwrap_or(28);
    keys.windows(window, |layer| layer >= first)
}
