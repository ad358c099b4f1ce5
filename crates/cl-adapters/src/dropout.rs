use cl_checkpoint::seed::splitmix64;
use cl_torch::tch::{self, Tensor};

/// Whether a forward pass is for training, and the seed of its dropout masks.
///
/// A mask depends only on this seed and the module. Recomputing a checkpointed layer therefore gives the same mask, and
/// a resumed run has the same masks as an uninterrupted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No dropout.
    Eval,
    /// Dropout with masks from this seed; use a different seed for every micro-batch.
    Train {
        /// Random seed of the masks.
        seed: u64,
    },
}

impl Mode {
    /// Drops elements of `x` with probability `p` and scales the others by `1/(1−p)`; `key` tells modules apart.
    pub(crate) fn dropout(self, x: &Tensor, p: f64, key: u64) -> Tensor {
        match self {
            Mode::Train { seed } if p > 0.0 => {
                // Seeding the process's generator is what works on every device; nothing else draws from it in a step.
                tch::manual_seed((splitmix64(seed ^ key) >> 1) as i64);
                let mask = x.empty_like().bernoulli_float_(1.0 - p) / (1.0 - p);
                x * mask
            }
            _ => x.shallow_clone(),
        }
    }

    /// `x·Wᵀ + b`, in training and without by the same product, so that activations that are computed again have the same bits.
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
        // One test owns the process's generator at a time only within this test binary's single user of it.
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        // 4096 draws of p = 0.75: five standard deviations of the mean of the scaled mask are 0.045.
        assert!((draw(1, 2).mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.045);
        assert_eq!(Mode::Eval.dropout(&x, 0.25, 2), x);
    }
}
