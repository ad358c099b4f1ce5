//! Validation during training: the validation loss, the best weights so far, and early stopping.

use std::path::PathBuf;

use cl_adapters::Mode;
use cl_data::{Encoded, pack};
use cl_model::{Decoder, PackedBatch, supervised_loss};
use cl_torch::tch::{self, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::plan::hash_examples;
use crate::ranks::deal;
use crate::sharding::Sharding;
use crate::{Plan, Ranks, TrainConfig, TrainError};

/// Settings of validation during training (`[validation]`), on a held-out fraction of the training data or on a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationConfig {
    /// Fraction of the training rows to hold out, drawn at random with the run's seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// A file of examples, or a task directory with an `eval` split, to use instead of `fraction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Number of steps between evaluations; by default one epoch. There is always an evaluation after the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// The weights to save as the result.
    pub keep: Keep,
    /// Stop after this many consecutive evaluations without improvement (Transformers' `early_stopping_patience`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Minimum decrease of the loss that counts as an improvement for `patience` (Transformers'
    /// `early_stopping_threshold`).
    pub threshold: f64,
}

/// The weights to save as the result of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Weights with the lowest validation loss (Transformers' `load_best_model_at_end`).
    #[default]
    Best,
    /// Weights after the last step.
    Last,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        ValidationConfig { fraction: None, data: None, every: None, keep: Keep::Best, patience: None, threshold: 0.0 }
    }
}

impl ValidationConfig {
    /// Checks all ranges, and that exactly one of `fraction` and `data` is set.
    ///
    /// # Errors
    /// Returns [`TrainError::Config`] with the first invalid key, its value and the allowed values.
    pub fn validate(&self) -> Result<(), TrainError> {
        let wrong = |key, value: String, expected| Err(TrainError::Config { key, value, expected });
        match (self.fraction, &self.data) {
            (None, None) => return wrong("validation", "{}".to_owned(), "either `fraction` or `data`"),
            (Some(_), Some(_)) => {
                return wrong("validation", "`fraction` and `data`".to_owned(), "only one of the two");
            }
            (Some(f), None) if !(f > 0.0 && f < 1.0) => {
                return wrong("validation.fraction", f.to_string(), "a number between 0 and 1, such as 0.1");
            }
            _ => {}
        }
        for (key, value) in [("validation.every", self.every), ("validation.patience", self.patience)] {
            if value.is_some_and(|n| n == 0 || n > 1_000_000_000) {
                return wrong(key, value.unwrap_or_default().to_string(), "1 to 1,000,000,000");
            }
        }
        if !(self.threshold >= 0.0 && self.threshold.is_finite()) {
            return wrong("validation.threshold", self.threshold.to_string(), "a number of at least 0");
        }
        Ok(())
    }
}

/// Validation data of a round, with its settings.
#[derive(Clone, Copy)]
pub struct Validation<'a> {
    /// Settings.
    pub config: &'a ValidationConfig,
    /// Tokenized examples.
    pub examples: &'a [Encoded],
}

/// The results of the evaluations so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationReport {
    /// Number of evaluations.
    pub evaluations: u64,
    /// Lowest loss.
    pub best_loss: f64,
    /// Step with the lowest loss.
    pub best_step: u64,
    /// Number of consecutive evaluations without improvement.
    pub without_improvement: u64,
}

/// Validation state that is saved with a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ValidationState {
    /// Settings.
    pub(crate) config: ValidationConfig,
    /// Hash of the validation data.
    pub(crate) data: String,
    /// Results, if there has been an evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) report: Option<ValidationReport>,
}

impl ValidationState {
    /// # Errors
    /// Returns an error if the settings are invalid, or no example has a supervised token.
    pub(crate) fn new(validation: &Validation<'_>) -> Result<ValidationState, TrainError> {
        validation.config.validate()?;
        if validation.examples.iter().all(|e| e.targets() == 0) {
            return Err(TrainError::NoValidationData { examples: validation.examples.len() });
        }
        let mut hasher = blake3::Hasher::new();
        hash_examples(&mut hasher, validation.examples.iter());
        let data = hasher.finalize().to_hex().to_string();
        Ok(ValidationState { config: validation.config.clone(), data, report: None })
    }

    /// Whether an evaluation is due after step `done`.
    pub(crate) fn is_due(&self, done: u64, plan: &Plan) -> bool {
        done == plan.total_steps || done.is_multiple_of(self.config.every.unwrap_or(plan.steps_per_epoch))
    }

    /// Adds the loss after step `done`; returns whether it is the lowest so far.
    ///
    /// As in Transformers, any lower loss is the best one, but only a loss that is lower by more than `threshold`
    /// counts as an improvement for `patience`.
    pub(crate) fn add(&mut self, done: u64, loss: f64) -> bool {
        let Some(report) = &mut self.report else {
            self.report =
                Some(ValidationReport { evaluations: 1, best_loss: loss, best_step: done, without_improvement: 0 });
            return true;
        };
        report.evaluations += 1;
        let better = loss < report.best_loss;
        let improved = better && report.best_loss - loss > self.config.threshold;
        report.without_improvement = if improved { 0 } else { report.without_improvement + 1 };
        if better {
            (report.best_loss, report.best_step) = (loss, done);
        }
        better
    }

    /// Whether training stops early.
    pub(crate) fn stops(&self) -> bool {
        let without = self.report.as_ref().map_or(0, |r| r.without_improvement);
        self.config.patience.is_some_and(|patience| without >= patience)
    }
}

/// Computes the mean loss over all supervised tokens of the examples, without dropout. Batches are assigned to the
/// ranks in turn.
pub(crate) fn eval_loss(
    model: &Decoder,
    examples: &[Encoded],
    config: &TrainConfig,
    ranks: &Ranks,
    sharding: Option<&Sharding>,
) -> Result<f64, TrainError> {
    let _no_graph = tch::no_grad_guard();
    let (mut sum, mut tokens) = (0.0, 0);
    let batches: Vec<&[Encoded]> = examples.chunks(config.micro_batch_size).collect();
    let own = deal(batches.len(), |_| true, ranks, sharding.is_some_and(Sharding::in_lockstep));
    for (index, counts) in own {
        let packed = pack(&batches[index].iter().collect::<Vec<_>>());
        let batch = PackedBatch::from_packed(&packed, model.config.vocab_size, model.device)?;
        sharding.map_or(Ok(()), |sharding| sharding.begin_pass(false))?;
        let x = model.forward(&batch, Mode::Eval)?;
        let loss = supervised_loss(model, &x, &packed, 1.0, Mode::Eval)?;
        sharding.map_or(Ok(()), Sharding::end_forward)?;
        if counts {
            (sum, tokens) = (sum + loss.nll_sum, tokens + loss.tokens);
        }
    }
    let mut sums = [sum, tokens as f64];
    ranks.sum(&mut sums)?;
    Ok(sums[0] / sums[1])
}

/// Copies the parameters to host memory.
pub(crate) fn snapshot(params: &[Tensor]) -> Vec<Tensor> {
    params.iter().map(|p| p.detach().to_device(Device::Cpu).copy()).collect()
}

/// Restores the parameters from a snapshot.
pub(crate) fn restore(params: &mut [Tensor], saved: &[Tensor]) {
    let _no_graph = tch::no_grad_guard();
    params.iter_mut().zip(saved).for_each(|(param, saved)| param.copy_(saved));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(patience: u64, threshold: f64) -> ValidationState {
        let config = ValidationConfig { patience: Some(patience), threshold, ..Default::default() };
        ValidationState { config, data: String::new(), report: None }
    }

    /// The number of steps after which training stops, and the best step.
    fn outcome(mut state: ValidationState, losses: &[f64]) -> (usize, u64) {
        for (i, &loss) in losses.iter().enumerate() {
            state.add(i as u64 + 1, loss);
            if state.stops() {
                return (i + 1, state.report.unwrap().best_step);
            }
        }
        (losses.len(), state.report.unwrap().best_step)
    }

    #[test]
    fn patience_and_threshold_count_as_in_transformers() {
        // EarlyStoppingCallback.check_metric_value runs before the best metric is updated; the best is any lower value.
        assert_eq!(outcome(state(2, 0.0), &[3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 1.0]), (6, 4));
        assert_eq!(outcome(state(1, 0.0), &[3.0, 3.0]), (2, 1));
        assert_eq!(outcome(state(2, 0.5), &[3.0, 2.7, 2.4, 2.0]), (3, 3));
        assert_eq!(outcome(state(2, 0.5), &[3.0, 2.7, 2.1, 2.0]), (4, 4));
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        let fraction = |f| ValidationConfig { fraction: Some(f), ..Default::default() };
        for (config, part) in [
            (ValidationConfig::default(), "either `fraction` or `data`"),
            (ValidationConfig { data: Some("v".into()), ..fraction(0.1) }, "only one of the two"),
            (fraction(0.0), "validation.fraction = 0"),
            (fraction(1.0), "validation.fraction = 1"),
            (fraction(f64::NAN), "validation.fraction"),
            (ValidationConfig { every: Some(0), ..fraction(0.1) }, "validation.every = 0"),
            (ValidationConfig { patience: Some(0), ..fraction(0.1) }, "validation.patience = 0"),
            (ValidationConfig { threshold: -1.0, ..fraction(0.1) }, "validation.threshold = -1"),
        ] {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        fraction(0.1).validate().unwrap();
    }
}
