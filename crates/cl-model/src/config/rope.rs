//! Rotary frequencies: their base, and their scaling for longer contexts.

use serde_json::{Map, Value};

use crate::problem::RopeProblem;

/// Scaling of rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Every frequency is divided by `factor`.
    Linear {
        /// Scaling factor.
        factor: f64,
    },
    /// Llama 3: low frequencies are divided by `factor`, high ones are unchanged, and there is a linear transition
    /// between them.
    Llama3 {
        /// Scaling factor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are unchanged.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original_max_position_embeddings: f64,
    },
    /// LongRoPE (Ding et al., arXiv:2402.13753) within the context length of pretraining: each frequency is divided by
    /// its own factor, and cosines and sines are scaled. The factors for longer contexts are not used.
    LongRope {
        /// Divisor of each frequency.
        short_factor: Vec<f64>,
        /// Factor by which cosines and sines are multiplied.
        attention_factor: f64,
    },
}

/// The scaling described by a `rope_scaling` table.
pub(super) fn scaling(map: &Map<String, Value>) -> Result<RopeScaling, RopeProblem> {
    match kind(map) {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: number(map, "factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number(map, "factor")?,
            low_freq_factor: number(map, "low_freq_factor")?,
            high_freq_factor: number(map, "high_freq_factor")?,
            original_max_position_embeddings: number(map, "original_max_position_embeddings")?,
        }),
        other => Err(RopeProblem::ScalingType { name: other.to_owned() }),
    }
}

/// The name of a scaling type.
pub(super) fn kind(map: &Map<String, Value>) -> &str {
    map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or("default")
}

pub(super) fn number(map: &Map<String, Value>, key: &'static str) -> Result<f64, RopeProblem> {
    match map.get(key).and_then(Value::as_f64) {
        Some(n) if n.is_finite() && n > 0.0 => Ok(n),
        Some(value) => Err(RopeProblem::NotPositive { key, value }),
        None => Err(RopeProblem::NoNumber { key }),
    }
}
