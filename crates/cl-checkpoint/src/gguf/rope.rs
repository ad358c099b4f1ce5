//! Derives `rope_scaling` from a GGUF file: `linear` and `yarn` have keys, but for Llama 3's rule there is only the
//! tensor `rope_freqs.weight`, whose values divide the rotary frequencies.

use std::f64::consts::PI;

use serde_json::{Value, json};

use super::keys::Keys;
use super::{Error, GgufFile, KeyProblem, TensorProblem, dequantize};

pub(super) const FACTORS: &str = "rope_freqs.weight";

pub(super) fn scaling(
    file: &GgufFile,
    prefix: &'static str,
    head_dim: usize,
    theta: f64,
) -> Result<Option<Value>, Error> {
    let keys = Keys { file, prefix };
    let original = keys.optional("rope.scaling.original_context_length")?;
    let stated = stated(&keys, original)?;
    let factors = factors(file, head_dim)?;
    match (stated, factors) {
        (Some(_), Some(_)) => {
            Err(file.tensor_error(FACTORS, TensorProblem::AndKey { key: keys.full("rope.scaling.type") }))
        }
        (None, Some(factors)) => match recover(&factors, head_dim, theta, original) {
            Some(rule) => Ok(Some(rule.to_json())),
            None => Err(file.tensor_error(FACTORS, TensorProblem::NotLlama3 { factors })),
        },
        (stated, None) => Ok(stated),
    }
}

/// Returns the scaling specified by keys.
fn stated(keys: &Keys, original: Option<usize>) -> Result<Option<Value>, Error> {
    let float = |key: &str| keys.file.float(&keys.full(key));
    let old_linear = float("rope.scale_linear")?.filter(|&f| f != 1.0);
    let kind = keys.file.string(&keys.full("rope.scaling.type"))?;
    let factor = float("rope.scaling.factor")?.or(old_linear).filter(|&f| f != 0.0);
    if let Some(factor) = float("rope.scaling.attn_factor")?.filter(|&f| f != 1.0) {
        return Err(keys.error("rope.scaling.attn_factor", KeyProblem::AttentionFactor { factor }));
    }
    let kind = kind.unwrap_or(if factor.is_some() { "linear" } else { "none" });
    match (kind, factor) {
        ("none", _) => Ok(None),
        ("linear" | "yarn", None) => {
            Err(keys.error("rope.scaling.type", KeyProblem::NoScalingFactor { kind: kind.to_owned() }))
        }
        ("linear" | "yarn", Some(factor)) if factor < 1.0 => {
            Err(keys.error("rope.scaling.factor", KeyProblem::ScalingFactor { factor }))
        }
        ("linear", Some(factor)) => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        ("yarn", Some(factor)) => {
            let mut scaling = json!({"rope_type": "yarn", "factor": factor});
            if let Some(original) = original {
                scaling["original_max_position_embeddings"] = original.into();
            }
            Ok(Some(scaling))
        }
        (other, _) => Err(keys.error("rope.scaling.type", KeyProblem::ScalingType { kind: other.to_owned() })),
    }
}

/// Returns the factors, one per pair of rotated dimensions; `None` if there are none or all are 1.
fn factors(file: &GgufFile, head_dim: usize) -> Result<Option<Vec<f64>>, Error> {
    let Some(tensor) = file.tensors().get(FACTORS) else { return Ok(None) };
    if tensor.shape != [head_dim / 2] {
        let problem = TensorProblem::Shape { expected: vec![head_dim / 2], found: tensor.shape.clone() };
        return Err(file.tensor_error(FACTORS, problem));
    }
    let mut factors = vec![0.0; head_dim / 2];
    dequantize(tensor.ggml_type, file.bytes(tensor), &mut factors);
    if let Some(&factor) = factors.iter().find(|f| !(f.is_finite() && **f >= 1.0)) {
        return Err(file.tensor_error(FACTORS, TensorProblem::Factor { factor }));
    }
    let scaled = factors.iter().any(|&f| f != 1.0);
    Ok(scaled.then(|| factors.into_iter().map(f64::from).collect()))
}

/// Llama 3's rule. With the wavelength λ = 2π·theta^(2i/d), frequencies with λ < original/high are unchanged, those
/// with λ > original/low are divided by `factor`, and those between are divided by 1 / ((1 − s)/factor + s), where s =
/// (original/λ − low) / (high − low).
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn at(&self, wavelength: f64) -> f64 {
        let s = ((self.original / wavelength - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - s) / self.factor + s)
    }

    fn to_json(&self) -> Value {
        json!({
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original as u64,
        })
    }
}

/// Finds a rule that yields these factors. Scaling `original`, `low` and `high` together has no effect, so `low` is set
/// to 1, as in every published model. Candidates are `high` = 4 with the stated, the usual or the implied `original`,
/// then both fitted to the factors.
fn recover(factors: &[f64], head_dim: usize, theta: f64, stated: Option<usize>) -> Option<Llama3> {
    let wavelength = |i: usize| 2.0 * PI * theta.powf(2.0 * i as f64 / head_dim as f64);
    let factor = factors.iter().copied().fold(1.0, f64::max);
    let rule = |high: f64, original: f64| Llama3 { factor, low: 1.0, high, original: original.round() };
    // Where the rule interpolates, original/λ is s·(high − low) + low.
    let between: Vec<(f64, f64)> = (0..factors.len())
        .filter(|&i| factors[i] > 1.0 && factors[i] < factor)
        .map(|i| (wavelength(i), (1.0 / factors[i] - 1.0 / factor) / (1.0 - 1.0 / factor)))
        .collect();
    let mut candidates: Vec<Llama3> = stated.into_iter().map(|s| rule(4.0, s as f64)).collect();
    candidates.push(rule(4.0, 8192.0));
    candidates.extend(between.iter().map(|&(wavelength, s)| rule(4.0, wavelength * (3.0 * s + 1.0))));
    if let (Some(&(w0, s0)), Some(&(w1, s1))) = (between.first(), between.last()) {
        let slope = (s0 - s1) / (1.0 / w0 - 1.0 / w1); // original / (high − 1)
        let offset = slope / w0 - s0; // 1 / (high − 1)
        candidates.push(rule(1.0 + 1.0 / offset, slope / offset));
    }
    // The writer computes in f32 and `original` is rounded to an integer, so factors agree to a few parts in 10⁵.
    let fits = |rule: &Llama3| {
        rule.original >= 1.0
            && rule.high > 1.0
            && rule.high.is_finite()
            && factors.iter().enumerate().all(|(i, f)| (rule.at(wavelength(i)) / f - 1.0).abs() < 1e-4)
    };
    candidates.into_iter().find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovers_the_rule_from_its_factors() {
        let rules = [(8.0, 4.0, 8192.0, 128), (32.0, 4.0, 8192.0, 64), (8.0, 4.0, 64.0, 16), (4.0, 6.0, 2048.0, 128)];
        for (factor, high, original, head_dim) in rules {
            let rule = Llama3 { factor, low: 1.0, high, original };
            let theta: f64 = 500_000.0;
            let factors: Vec<f64> = (0..head_dim / 2)
                .map(|i| rule.at(2.0 * PI * theta.powf(2.0 * i as f64 / head_dim as f64)) as f32 as f64)
                .collect();
            let found = recover(&factors, head_dim, theta, None).unwrap();
            assert_eq!((found.factor, found.original), (factor, original));
            assert!((found.high - high).abs() < 1e-3, "{} instead of {high}", found.high);
        }
    }

    #[test]
    fn other_factors_are_refused() {
        assert!(recover(&[1.0, 3.0, 1.0, 8.0], 8, 10_000.0, None).is_none());
        assert!(recover(&[2.0; 4], 8, 10_000.0, None).is_none());
    }
}
