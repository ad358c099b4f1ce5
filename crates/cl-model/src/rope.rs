use std::f64::consts::PI;

use cl_torch::tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, RopeScaling};

/// Rotary position embeddings (Su et al., "RoFormer", arXiv:2104.09864) in the half-split layout of Hugging Face
/// checkpoints.
pub(crate) struct Rope {
    all: Frequencies,
    windowed: Option<Frequencies>, // of layers with a window, if they have their own
}

struct Frequencies {
    inverse: Tensor, // (rotary_dim/2), f32
    factor: f64,     // by which cosines and sines are multiplied
}

/// Cosines and sines for the positions of one batch.
pub(crate) struct Angles {
    all: Rotation,
    windowed: Option<Rotation>,
}

/// Cosines and sines, `(tokens, 1, rotary_dim/2)` in the compute dtype.
struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Rope {
        let of = |theta, scaling| Frequencies::new(config.rotary_dim, theta, scaling, device);
        Rope {
            all: of(config.rope_theta, &config.rope_scaling),
            windowed: config.rope_local_base_freq.map(|theta| of(theta, &RopeScaling::Default)),
        }
    }

    /// Computes the angles of `positions` `(tokens)`, int64.
    pub(crate) fn angles(&self, positions: &Tensor, kind: Kind) -> Angles {
        let rotation = |f: &Frequencies| f.rotation(positions, kind);
        Angles { all: rotation(&self.all), windowed: self.windowed.as_ref().map(rotation) }
    }
}

impl Frequencies {
    fn new(rotary_dim: i64, theta: f64, scaling: &RopeScaling, device: Device) -> Frequencies {
        let frequency = |i: i64| {
            // Computed in f32 at each step, as in the models' reference code: the rounding is part of the model.
            let exponent = (2 * i) as f32 / rotary_dim as f32;
            match scaling {
                RopeScaling::LongRope { short_factor, .. } => {
                    1.0f32 / (short_factor[i as usize] as f32 * (theta as f32).powf(exponent))
                }
                _ => scale(f64::from(1.0f32 / (theta as f32).powf(exponent)), scaling) as f32,
            }
        };
        let inverse: Vec<f32> = (0..rotary_dim / 2).map(frequency).collect();
        let factor = match scaling {
            RopeScaling::LongRope { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        };
        Frequencies { inverse: Tensor::from_slice(&inverse).to_device(device), factor }
    }

    fn rotation(&self, positions: &Tensor, kind: Kind) -> Rotation {
        let angle = (positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse).unsqueeze(1);
        let scaled = |t: Tensor| if self.factor == 1.0 { t } else { t * self.factor };
        Rotation { cos: scaled(angle.cos()).to_kind(kind), sin: scaled(angle.sin()).to_kind(kind) }
    }
}

impl Angles {
    /// Rotates `x` `(tokens, heads, head_dim)`, with the frequencies of layers with a sliding window if `windowed`.
    pub(crate) fn rotate(&self, x: &Tensor, windowed: bool) -> Tensor {
        let rotation = self.windowed.as_ref().filter(|_| windowed).unwrap_or(&self.all);
        cl_torch::rotate(x, &rotation.cos, &rotation.sin)
    }

    pub(crate) fn shallow_clone(&self) -> Angles {
        let clone = |r: &Rotation| Rotation { cos: r.cos.shallow_clone(), sin: r.sin.shallow_clone() };
        Angles { all: clone(&self.all), windowed: self.windowed.as_ref().map(clone) }
    }
}

/// Scales a frequency. Llama 3's rule is from "The Llama 3 Herd of Models", arXiv:2407.21783, as its published
/// checkpoints apply it.
fn scale(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Default | RopeScaling::LongRope { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelength = 2.0 * PI / frequency;
            if wavelength < original_max_position_embeddings / high_freq_factor {
                frequency
            } else if wavelength > original_max_position_embeddings / low_freq_factor {
                frequency / factor
            } else {
                let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_lengths_and_depends_on_distance_only() {
        let frequencies = Frequencies { inverse: Tensor::from_slice(&[1f32, 0.25]), factor: 1.0 };
        let rope = Rope { all: frequencies, windowed: None };
        let x = Tensor::from_slice(&[1f32, 2., 3., 4.]).reshape([1, 1, 4]);
        let at = |p: i64| rope.angles(&Tensor::from_slice(&[p]), Kind::Float).rotate(&x, false);
        let dot = |a: &Tensor, b: &Tensor| (a * b).sum(Kind::Float).double_value(&[]);
        // f32 has a 24-bit mantissa, and the sums are near 30.
        assert!((dot(&at(7), &at(7)) - 30.0).abs() < 1e-4);
        assert!((dot(&at(9), &at(4)) - dot(&at(6), &at(1))).abs() < 1e-4);
        assert_eq!(at(0), x);
    }

    #[test]
    fn llama3_keeps_short_and_stretches_long_wavelengths() {
        let rule = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        assert_eq!(scale(1.0, &rule), 1.0);
        assert_eq!(scale(1e-6, &rule), 1.25e-7);
        let middle = scale(2.0 * PI / 4096.0, &rule) * 4096.0 / (2.0 * PI);
        assert!((middle - (2.0 / 3.0 / 8.0 + 1.0 / 3.0)).abs() < 1e-12);
    }
}
