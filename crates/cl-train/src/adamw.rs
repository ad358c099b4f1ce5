use cl_torch::tch::{Kind, Tensor};
use cl_torch::{AdamW, foreach_mul_, fused_adamw, global_norm};

use crate::TrainError;

/// AdamW with its states, over a fixed list of leaves.
pub(crate) struct Optimizer {
    pub(crate) names: Vec<String>,
    pub(crate) params: Vec<Tensor>,
    pub(crate) exp_avg: Vec<Tensor>,
    pub(crate) exp_avg_sq: Vec<Tensor>,
    step: Tensor,
}

impl Optimizer {
    pub(crate) fn new(trainable: Vec<(String, Tensor)>) -> Optimizer {
        let (names, params): (Vec<_>, Vec<_>) = trainable.into_iter().unzip();
        let zeros = || params.iter().map(|p| p.detach().zeros_like()).collect();
        let device = params[0].device();
        Optimizer {
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            step: Tensor::zeros([], (Kind::Float, device)),
            names,
            params,
        }
    }

    /// Norm over all gradients; then scales them down to `max_norm` as PyTorch's `clip_grad_norm_` does (0: leaves them).
    pub(crate) fn clip(&self, max_norm: f64) -> Result<f64, TrainError> {
        let grads = self.grads();
        let grads: Vec<&Tensor> = grads.iter().flatten().collect();
        if grads.is_empty() {
            return Ok(0.0);
        }
        let norm = global_norm(&grads)?;
        if max_norm > 0.0 {
            let factor = (max_norm / (&norm + 1e-6)).clamp_max(1.0);
            foreach_mul_(&grads, &factor)?;
        }
        Ok(norm.double_value(&[]))
    }

    /// Moves the parameters; `number` is that of this step, from 1. Norms and biases do not decay, as in Transformers'
    /// Trainer.
    pub(crate) fn step(&mut self, number: u64, settings: AdamW) -> Result<(), TrainError> {
        let _ = self.step.fill_(number as f64);
        let grads = self.grads();
        for (decays, weight_decay) in [(true, settings.weight_decay), (false, 0.0)] {
            let (mut params, mut present, mut exp_avg, mut exp_avg_sq) = (vec![], vec![], vec![], vec![]);
            for (i, grad) in grads.iter().enumerate() {
                let Some(grad) = grad.as_ref().filter(|_| (self.params[i].dim() > 1) == decays) else { continue };
                params.push(&self.params[i]);
                present.push(grad);
                exp_avg.push(&self.exp_avg[i]);
                exp_avg_sq.push(&self.exp_avg_sq[i]);
            }
            if !params.is_empty() {
                let steps = vec![&self.step; params.len()];
                fused_adamw(&params, &present, &exp_avg, &exp_avg_sq, &steps, AdamW { weight_decay, ..settings })?;
            }
        }
        Ok(())
    }

    /// Forgets the gradients of the step.
    pub(crate) fn zero_grad(&mut self) {
        self.params.iter_mut().for_each(Tensor::zero_grad);
    }

    fn grads(&self) -> Vec<Option<Tensor>> {
        self.params.iter().map(|p| Some(p.grad()).filter(Tensor::defined)).collect()
    }
}
