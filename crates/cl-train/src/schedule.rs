use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Learning rate schedule after a linear warm-up from 0; names and formulas are those of Transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Constant.
    Constant,
    /// Linear decay to 0.
    Linear,
    /// Cosine decay to 0.
    Cosine,
}

impl Schedule {
    /// Multiplier of the learning rate at `step` (from 0) of `total`, with `warmup` warm-up steps.
    ///
    /// ```
    /// use cl_train::Schedule;
    /// assert_eq!(Schedule::Linear.factor(0, 2, 12), 0.0);
    /// assert_eq!(Schedule::Linear.factor(2, 2, 12), 1.0);
    /// assert_eq!(Schedule::Linear.factor(7, 2, 12), 0.5);
    /// ```
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_transformers() {
        // from transformers import get_scheduler; o = torch.optim.SGD([torch.zeros(1)], lr=1.)
        // s = get_scheduler("cosine", o, 4, 20); step it: lr after 0, 2, 4, 8, 12, 20 steps (transformers 5.23.0)
        let expected = [0.0, 0.5, 1.0, 0.853_553_390_593_273_7, 0.5, 0.0];
        for (step, lr) in [0, 2, 4, 8, 12, 20].into_iter().zip(expected) {
            assert!((Schedule::Cosine.factor(step, 4, 20) - lr).abs() < 1e-12, "step {step}");
        }
        assert_eq!(Schedule::Constant.factor(1000, 0, 10), 1.0);
        assert_eq!(Schedule::Linear.factor(30, 0, 20), 0.0, "past the end it stays at 0");
    }
}
