use std::f64::consts::PI;

use cl_torch::tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, RopeScaling};

/// Rotary positions (Su et al., "RoFormer", arXiv:2104.09864) in the half-split layout of Hugging Face checkpoints.
pub(crate) struct Rope {
    inverse_frequencies: Tensor, // (head_dim/2), f32
}

/// Cosines and sines of one batch's positions, `(tokens, 1, head_dim/2)` in the compute dtype.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Rope {
        let frequencies: Vec<f32> = (0..config.head_dim / 2)
            .map(|i| {
                // In f32 at each step, as the checkpoints' own code does: the rounding is part of the model.
                let exponent = (2 * i) as f32 / config.head_dim as f32;
                let f = 1.0f32 / (config.rope_theta as f32).powf(exponent);
                scale(f64::from(f), &config.rope_scaling) as f32
            })
            .collect();
        Rope { inverse_frequencies: Tensor::from_slice(&frequencies).to_device(device) }
    }

    /// `positions` is `(tokens)`, int64.
    pub(crate) fn angles(&self, positions: &Tensor, kind: Kind) -> Angles {
        let angle = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse_frequencies;
        let angle = angle.unsqueeze(1);
        Angles { cos: angle.cos().to_kind(kind), sin: angle.sin().to_kind(kind) }
    }
}

impl Angles {
    /// Rotates `x` `(tokens, heads, head_dim)`: element i is paired with i + head_dim/2.
    pub(crate) fn rotate(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let (x1, x2) = (&halves[0], &halves[1]);
        Tensor::cat(&[x1 * &self.cos - x2 * &self.sin, x2 * &self.cos + x1 * &self.sin], -1)
    }

    pub(crate) fn shallow_clone(&self) -> Angles {
        Angles { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }
}

/// Llama 3's rule is from "The Llama 3 Herd of Models", arXiv:2407.21783, as its published checkpoints apply it.
fn scale(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Default => frequency,
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
        let rope = Rope { inverse_frequencies: Tensor::from_slice(&[1f32, 0.25]) };
        let x = Tensor::from_slice(&[1f32, 2., 3., 4.]).reshape([1, 1, 4]);
        let at = |p: i64| rope.angles(&Tensor::from_slice(&[p]), Kind::Float).rotate(&x);
        let dot = |a: &Tensor, b: &Tensor| (a * b).sum(Kind::Float).double_value(&[]);
        // f32 has 24 bits of mantissa and the sums are near 30.
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
