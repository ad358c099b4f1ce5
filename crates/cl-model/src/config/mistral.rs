use super::keys::{DEFAULTS, Defaults, Keys};
use super::{Family, ModelConfig};
use crate::problem::ConfigProblem;

/// Mistral: every layer has a sliding window, 4,096 by default and none if the key is null.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(8), ..DEFAULTS };
    let window = keys.sliding_window.unwrap_or(Some(4096));
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        windows: keys.windows(window, |_| true)?,
        ..keys.config(Family::Mistral, &defaults)?
    })
}
