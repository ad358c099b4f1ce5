use serde_json::{Map, Value};

use super::keys::{DEFAULTS, Defaults, Keys};
use super::rope::{kind, number};
use super::{Family, ModelConfig, RopeScaling};
use crate::problem::{ConfigProblem, RopeProblem};

/// Phi-3 and Phi-4 (`phi3`): fused projections for q, k and v, and for gate and up; LongRoPE in the long-context
/// models.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { rms_norm_eps: 1e-5, max_position_embeddings: 4096, ..DEFAULTS };
    let config = ModelConfig {
        fused_projections: true,
        windows: keys.windows(keys.sliding_window.flatten(), |_| true)?,
        ..keys.config(Family::Phi3, &defaults)?
    };
    match keys.rope_scaling.as_ref().or(keys.rope_parameters.as_ref()) {
        Some(map) if matches!(kind(map), "longrope" | "su" | "yarn") => long_rope(keys, map, config),
        _ => Ok(ModelConfig { rope_scaling: keys.scaling()?, ..config }),
    }
}

/// Limits positions to the range of the short-context factors, because beyond it all cached keys would have to be
/// rotated again.
fn long_rope(keys: &Keys, map: &Map<String, Value>, config: ModelConfig) -> Result<ModelConfig, ConfigProblem> {
    let pairs = (config.rotary_dim / 2) as usize;
    let factors = map.get("short_factor").and_then(Value::as_array).ok_or(RopeProblem::NoShortFactor)?;
    let short_factor: Vec<f64> = factors.iter().filter_map(Value::as_f64).filter(|f| *f > 0.0).collect();
    if short_factor.len() != pairs {
        return Err(RopeProblem::ShortFactor { frequencies: pairs }.into());
    }
    let inside = map.get("original_max_position_embeddings").and_then(Value::as_u64).map(|n| n as usize);
    let original = inside.or(keys.original_max_position_embeddings).unwrap_or(4096);
    let stretch = match map.get("factor") {
        Some(factor) if !factor.is_null() => number(map, "factor")?,
        _ => config.max_position_embeddings as f64 / original as f64,
    };
    let attention_factor = match map.get("attention_factor") {
        Some(factor) if !factor.is_null() => number(map, "attention_factor")?,
        _ if stretch <= 1.0 => 1.0,
        _ => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(ModelConfig {
        max_position_embeddings: config.max_position_embeddings.min(original),
        rope_scaling: RopeScaling::LongRope { short_factor, attention_factor },
        ..config
    })
}
