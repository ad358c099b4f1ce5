use std::sync::Arc;

use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{AdamW, foreach_mul_, fused_adamw, global_norm, set_gradient};

use crate::sharding::Sharding;
use crate::{Ranks, TrainConfig, TrainError};

/// AdamW with its state, for a fixed list of parameters.
pub(crate) struct Optimizer {
    pub(crate) names: Vec<String>,
    /// The model's tensors.
    pub(crate) params: Vec<Tensor>,
    /// The tensors that this rank updates: the parameters themselves, or its shards of them.
    pub(crate) own: Vec<Tensor>,
    /// How the parameters are sharded, if they are.
    pub(crate) sharding: Option<Arc<Sharding>>,
    pub(crate) exp_avg: Vec<Tensor>,
    pub(crate) exp_avg_sq: Vec<Tensor>,
    groups: Vec<Group>,
    step: Tensor,
}

/// Parameters with the same settings.
struct Group {
    /// Whether weight decay applies. It does not apply to norms, biases and DoRA's magnitudes. (Transformers' Trainer
    /// decays magnitudes, PEFT's optimizer for LoRA+ does not.)
    decays: bool,
    /// Multiplier of the learning rate.
    factor: f64,
    /// Indices of the parameters in the optimizer's lists.
    places: Vec<usize>,
}

impl Optimizer {
    pub(crate) fn new(
        trainable: Vec<(String, Tensor)>,
        config: &TrainConfig,
        sharding: Option<Arc<Sharding>>,
    ) -> Optimizer {
        let (names, params): (Vec<String>, Vec<Tensor>) = trainable.into_iter().unzip();
        let mut groups: Vec<Group> = Vec::new();
        for (place, (name, param)) in names.iter().zip(&params).enumerate() {
            let (decays, factor) = (param.dim() > 1, learning_rate_factor(name, config));
            match groups.iter_mut().find(|g| g.decays == decays && g.factor == factor) {
                Some(group) => group.places.push(place),
                None => groups.push(Group { decays, factor, places: vec![place] }),
            }
        }
        let whole = || params.iter().map(Tensor::shallow_clone).collect();
        let own = sharding.as_ref().map_or_else(whole, |sharding| sharding.parts());
        let zeros = || own.iter().map(|p| p.detach().zeros_like()).collect();
        let device = params[0].device();
        Optimizer {
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            step: Tensor::zeros([], (Kind::Float, device)),
            groups,
            names,
            params,
            own,
            sharding,
        }
    }

    /// Returns the norm of all gradients, and clips the gradients to `max_norm` like PyTorch's `clip_grad_norm_` (0: no
    /// clipping).
    pub(crate) fn clip(&self, max_norm: f64, ranks: &Ranks) -> Result<f64, TrainError> {
        let grads = self.grads();
        let grads: Vec<&Tensor> = grads.iter().flatten().collect();
        if grads.is_empty() {
            return Ok(0.0);
        }
        let mut norm = global_norm(&grads)?;
        if self.sharding.is_some() {
            let mut square = [norm.double_value(&[]).powi(2)];
            ranks.sum(&mut square)?;
            norm = norm.full_like(square[0].sqrt());
        }
        if max_norm > 0.0 {
            let factor = (max_norm / (&norm + 1e-6)).clamp_max(1.0);
            foreach_mul_(&grads, &factor)?;
        }
        Ok(norm.double_value(&[]))
    }

    /// Updates the parameters. `number` is the number of the step, counted from 1.
    pub(crate) fn step(&mut self, number: u64, settings: AdamW) -> Result<(), TrainError> {
        let _ = self.step.fill_(number as f64);
        let grads = self.grads();
        for group in &self.groups {
            let (mut params, mut present, mut exp_avg, mut exp_avg_sq) = (vec![], vec![], vec![], vec![]);
            for &i in &group.places {
                let Some(grad) = &grads[i] else { continue };
                params.push(&self.own[i]);
                present.push(grad);
                exp_avg.push(&self.exp_avg[i]);
                exp_avg_sq.push(&self.exp_avg_sq[i]);
            }
            if !params.is_empty() {
                let steps = vec![&self.step; params.len()];
                let weight_decay = if group.decays { settings.weight_decay } else { 0.0 };
                let settings = AdamW { weight_decay, lr: settings.lr * group.factor, ..settings };
                fused_adamw(&params, &present, &exp_avg, &exp_avg_sq, &steps, settings)?;
            }
        }
        self.sharding.as_ref().map_or(Ok(()), |sharding| sharding.share_updates())
    }

    /// Checks that all parameters are finite after step `number`.
    pub(crate) fn check_finite(&self, number: u64, ranks: &Ranks) -> Result<(), TrainError> {
        let finite = |t: &Tensor| t.isfinite().all().int64_value(&[]) == 1;
        let mut first = self.own.iter().position(|own| !finite(own));
        if self.sharding.is_some() {
            // All ranks must report the same tensor.
            let mut counts: Vec<f64> = self.own.iter().map(|own| f64::from(u8::from(!finite(own)))).collect();
            ranks.sum(&mut counts)?;
            first = counts.iter().position(|count| *count > 0.0);
        }
        match first {
            Some(place) => Err(TrainError::NotFiniteWeight { step: number, tensor: self.names[place].clone() }),
            None => Ok(()),
        }
    }

    /// Clears the gradients. Those of experts are removed, so that an expert without tokens in the next step keeps its
    /// value, as with PyTorch's optimizers and as after a resume. On a GPU all are, to free their memory; on a CPU, the
    /// allocator would keep it, and the peak would be higher.
    pub(crate) fn zero_grad(&mut self) -> Result<(), TrainError> {
        if let Some(sharding) = &self.sharding {
            sharding.zero_grad();
            return Ok(());
        }
        for (name, param) in self.names.iter().zip(&mut self.params) {
            if param.device() == Device::Cpu && !name.contains(".experts.") {
                param.zero_grad();
            } else {
                set_gradient(param, None)?;
            }
        }
        Ok(())
    }

    /// Gathers the full tensors of parameters or moments from this rank's shards `own`, each given with its parameter's
    /// index and all of one dtype. All ranks must call this for the same tensors in the same order.
    pub(crate) fn whole(&self, own: &[(usize, &Tensor)]) -> Result<Vec<Tensor>, TrainError> {
        let Some(sharding) = &self.sharding else {
            return Ok(own.iter().map(|(_, own)| own.shallow_clone()).collect());
        };
        let shapes: Vec<Vec<i64>> = own.iter().map(|(place, _)| self.params[*place].size()).collect();
        let parts: Vec<(&Tensor, &[i64])> = own.iter().zip(&shapes).map(|((_, own), s)| (*own, s.as_slice())).collect();
        sharding.whole(&parts)
    }

    /// Returns this rank's shard of a full tensor.
    pub(crate) fn part(&self, whole: &Tensor) -> Tensor {
        self.sharding.as_ref().map_or_else(|| whole.shallow_clone(), |sharding| sharding.part(whole))
    }

    fn grads(&self) -> Vec<Option<Tensor>> {
        if let Some(sharding) = &self.sharding {
            return sharding.gradients(self.params.len());
        }
        self.params.iter().map(|p| Some(p.grad()).filter(Tensor::defined)).collect()
    }
}

/// Multiplier of a parameter's learning rate: LoRA+ uses a higher rate for B than for A, and adapters on the embedding
/// and the output head can have their own rate.
fn learning_rate_factor(name: &str, config: &TrainConfig) -> f64 {
    let Some(lora) = &config.lora else { return 1.0 };
    let of_tokens = ["model.embed_tokens.", "lm_head."].iter().any(|layer| name.starts_with(layer));
    match lora.embedding_learning_rate.filter(|_| of_tokens) {
        Some(rate) => rate / config.learning_rate,
        // Magnitudes and biases use B's rate, as in PEFT's optimizer.
        None if [".lora_B.weight", ".bias", ".lora_magnitude_vector"].iter().any(|end| name.ends_with(end)) => {
            lora.loraplus_lr_ratio.unwrap_or(1.0)
        }
        None => 1.0,
    }
}
