use cl_checkpoint::seed::splitmix64;
use cl_torch::tch::{self, Tensor};

/// Whether a forward pass is for training, and the seed of its dropout masks.
///
/// A mask depends only on this seed and the module. Therefore, recomputing a checkpointed layer gives the same mask,
/// and a resumed run has the same masks as an uninterrupted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Evaluation, without dropout.
    Eval,
    /// Training, with dropout masks from this seed; use a different seed for every micro-batch.
    Train {
        /// Random seed of the masks.
        seed: u64,
    },
}

impl Mode {
    /// Drops elements of `x` with probability `p` and scales the others by `1/(1−p)`; `key` identifies the module.
    pub(crate) fn dropout(self, x: &Tensor, p: f64, key: u64) -> Tensor {
        match self {
            Mode::Train { seed } if p > 0.0 => {
                // Seeding the process-wide generator works on every device; nothing else draws from it during a step.
                tch::manual_seed((splitmix64(seed ^ key) >> 1) as i64);
                let mask = x.empty_like().bernoulli_float_(1.0 - p) / (1.0 - p);
                x * mask
            }
            _ => x.shallow_clone(),
        }
    }

    /// Computes `x·Wᵀ + b` by the same product in training and evaluation, so that recomputed activations are
    /// bit-identical.
    pub(crate) fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        cl_torch::linear(x, weight, bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cl_torch::tch::{Device, Kind};

    #[test]
    fn the_same_key_draws_the_same_mask() {
        let x = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
        let draw = |seed, key| Mode::Train { seed }.dropout(&x, 0.25, key);
        // Within this test binary, this is the only test that uses the process-wide generator.
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        // 4096 draws of p = 0.75: five standard deviations of the mean of the scaled mask are 0.045.
        assert!((draw(1, 2).mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.045);
        assert_eq!(Mode::Eval.dropout(&x, 0.25, 2), x);
    }
}
