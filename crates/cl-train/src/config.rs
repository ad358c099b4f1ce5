use cl_adapters::{InitLoraWeights, LoraConfig, OloraConfig, SequenceShape};
use cl_checkpoint::Precision;
use cl_model::LoadOptions;
use cl_torch::tch::{Device, Kind};
use serde::{Deserialize, Serialize};

use crate::{ReportTo, RouterTraining, Schedule, TrainError};

/// Settings of one round of fine-tuning. Names and defaults follow Transformers' `TrainingArguments` where a setting
/// exists there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of epochs. Ignored if `max_steps` is set.
    pub epochs: u64,
    /// Number of optimizer steps; overrides `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Examples per forward and backward pass.
    pub micro_batch_size: usize,
    /// Micro-batches per optimizer step, summed over all processes.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Schedule of the learning rate.
    pub lr_scheduler_type: Schedule,
    /// Number of steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// AdamW's β₁.
    pub adam_beta1: f64,
    /// AdamW's β₂.
    pub adam_beta2: f64,
    /// AdamW's ε.
    pub adam_epsilon: f64,
    /// Decoupled weight decay of matrices. It does not apply to norms and biases.
    pub weight_decay: f64,
    /// Maximum norm of the gradients (gradient clipping); 0 disables clipping.
    pub max_grad_norm: f64,
    /// Normalization of the loss over a step.
    pub loss_norm: LossNorm,
    /// Dtype of activations and matrix products.
    pub precision: Precision,
    /// Dtype of the adapters' matrix products; defaults to `precision`, as in PEFT within autocast. Without autocast,
    /// PEFT computes in f32, and so does `profile = "paper"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_precision: Option<Precision>,
    /// Dtype of weights and optimizer states in full fine-tuning.
    pub states: States,
    /// Recompute activations in the backward pass (activation checkpointing): less memory for about a third more time.
    pub activation_checkpointing: bool,
    /// ZeRO stage: what is sharded over several processes. 1: the optimizer state; 2: gradients as well; 3: the base
    /// model's weights as well, with `activation_checkpointing`. 0: nothing is sharded.
    #[serde(skip_serializing_if = "is_zero")]
    pub zero_stage: u8,
    /// With `zero_stage` above 0 and several processes, every process writes its own shard of a checkpoint, so that
    /// nothing is sent to rank 0. `out` must be on a file system that all processes share.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sharded_checkpoints: bool,
    /// Maximum number of tokens of an example; longer ones are truncated in the middle. No limit if `None`.
    pub max_length: Option<usize>,
    /// Number of steps between checkpoints; one is also saved after the last step. 0: no checkpoints.
    pub save_steps: u64,
    /// Number of the most recent checkpoints that are also written as adapters or models, as
    /// `checkpoints/step-<step>` in the output directory. 0: none.
    #[serde(skip_serializing_if = "is_none_kept")]
    pub keep_checkpoints: usize,
    /// Additional formats of the step log.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub report_to: Vec<ReportTo>,
    /// Shuffle the examples; otherwise they are in file order.
    pub shuffle: bool,
    /// PEFT adapter directory to continue from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_adapter: Option<std::path::PathBuf>,
    /// Train a LoRA adapter (`[train.lora]`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Keep the adapter orthogonal to those of earlier rounds (O-LoRA, `[train.olora]`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub olora: Option<OloraConfig>,
    /// Train all weights (`[train.full]`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<Full>,
    /// Train only the routers of a mixture: the table `[router]` of `cl moe train-router`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterTraining>,
}

/// Full fine-tuning. It has no settings; the presence of the table selects it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Full {}

/// Normalization of the loss over an optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossNorm {
    /// Mean over all supervised tokens of the step, so that all tokens have the same weight.
    TokenMean,
    /// Mean over the supervised tokens of each micro-batch, then over micro-batches, as in the paper; tokens of long
    /// answers have less weight.
    MicrobatchMean,
}

/// Dtype of weights and AdamW states in full fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum States {
    /// f32 master weights and states.
    F32,
    /// Weights and states in the dtype of `precision`. With `precision = "bf16"`, this is the paper's pure bf16, in
    /// which most updates at a small learning rate are rounded away.
    Pure,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            epochs: 1,
            max_steps: None,
            micro_batch_size: 4,
            gradient_accumulation_steps: 1,
            learning_rate: 2e-4,
            lr_scheduler_type: Schedule::Constant,
            warmup_steps: 0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            loss_norm: LossNorm::TokenMean,
            precision: Precision::F32,
            adapter_precision: None,
            states: States::F32,
            activation_checkpointing: false,
            zero_stage: 0,
            sharded_checkpoints: false,
            max_length: Some(1024),
            save_steps: 0,
            keep_checkpoints: 0,
            report_to: Vec::new(),
            shuffle: true,
            initial_adapter: None,
            lora: None,
            olora: None,
            full: None,
            router: None,
        }
    }
}

impl TrainConfig {
    /// Returns the settings that the trained weights depend on: without those of checkpoints, logs and sharding, which
    /// may change when a run is resumed.
    pub fn of_weights(&self) -> TrainConfig {
        let (save_steps, keep_checkpoints, report_to) = (0, 0, Vec::new());
        let (zero_stage, sharded_checkpoints) = (0, false);
        TrainConfig { save_steps, keep_checkpoints, report_to, zero_stage, sharded_checkpoints, ..self.clone() }
    }

    /// Checks all ranges, and that exactly one of `lora`, `full` and `router` is set.
    ///
    /// # Errors
    /// Returns [`TrainError::Config`] with the first invalid key, its value and the allowed values.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.validate_ranges()?;
        if let Some(router) = self.router {
            return self.validate_router(router);
        }
        let method = match (&self.lora, &self.full) {
            (Some(_), None) | (None, Some(_)) => None,
            (None, None) => Some("neither `lora` nor `full`"),
            (Some(_), Some(_)) => Some("both `lora` and `full`"),
        };
        if let Some(value) = method {
            let expected = "exactly one of the tables [train.lora] and [train.full]";
            return Err(TrainError::Config { key: "train", value: value.to_owned(), expected });
        }
        if self.full.is_some() && self.initial_adapter.is_some() {
            let value = "set together with `full`".to_owned();
            return Err(TrainError::Config { key: "initial_adapter", value, expected: "[train.lora]" });
        }
        if let Some(key) = self.lora.as_ref().filter(|_| self.zero_stage == 3).and_then(needs_weights) {
            let value = format!("3 with `{key}`");
            return Err(TrainError::Config {
                key: "zero_stage",
                value,
                expected: "0 to 2, which keep the weights that this needs",
            });
        }
        if let Some(base) = self.lora.as_ref().and_then(|lora| lora.base).filter(|_| self.zero_stage == 3) {
            let value = format!("3 with base = \"{}\"", base.name());
            let expected = "0 to 2: quantized weights are not divided among processes";
            return Err(TrainError::Config { key: "zero_stage", value, expected });
        }
        if self.sharded_checkpoints && self.zero_stage == 0 {
            let (value, expected) = (
                "true with zero_stage = 0".to_owned(),
                "zero_stage = 1, 2 or 3: without it, there are no shards to save",
            );
            return Err(TrainError::Config { key: "sharded_checkpoints", value, expected });
        }
        self.validate_kept()?;
        if let Some(lora) = &self.lora {
            lora.validate().map_err(cl_model::ModelError::from)?;
        }
        self.validate_olora()
    }

    fn validate_kept(&self) -> Result<(), TrainError> {
        let kept = self.keep_checkpoints;
        let wrong = |value, expected| Err(TrainError::Config { key: "keep_checkpoints", value, expected });
        if kept > 0 && self.save_steps == 0 {
            return wrong(format!("{kept} with save_steps = 0"), "save_steps above 0: the steps between checkpoints");
        }
        if kept > 0 && self.zero_stage == 3 {
            let expected = "zero_stage 0 to 2: with 3, no process has all weights before the end";
            return wrong(format!("{kept} with zero_stage = 3"), expected);
        }
        Ok(())
    }

    /// Checks that all numbers are within bounds, so that a typing error does not exhaust memory or run for a year.
    fn validate_ranges(&self) -> Result<(), TrainError> {
        let count = |key, value: u64, least: u64, most: u64, expected| {
            (key, value.to_string(), least <= value && value <= most, expected)
        };
        let number =
            |key, value: f64, holds: bool, expected| (key, value.to_string(), value.is_finite() && holds, expected);
        let size = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        let epochs = if self.max_steps.is_some() { 1 } else { self.epochs };
        let (rate, decay) = (self.learning_rate, self.weight_decay);
        let checks = [
            count("epochs", epochs, 1, 1_000_000, "1 to 1,000,000"),
            count("max_steps", self.max_steps.unwrap_or(1), 1, 1_000_000_000, "1 to 1,000,000,000"),
            count("micro_batch_size", size(self.micro_batch_size), 1, 65_536, "1 to 65,536"),
            count(
                "gradient_accumulation_steps",
                size(self.gradient_accumulation_steps),
                1,
                1_000_000,
                "1 to 1,000,000",
            ),
            count("warmup_steps", self.warmup_steps, 0, 1_000_000_000, "0 to 1,000,000,000"),
            count("zero_stage", u64::from(self.zero_stage), 0, 3, "0 to 3"),
            count("save_steps", self.save_steps, 0, 1_000_000_000, "0 (never) to 1,000,000,000"),
            count("keep_checkpoints", size(self.keep_checkpoints), 0, 1_000_000, "0 (none) to 1,000,000"),
            count("max_length", self.max_length.map_or(2, size), 2, 1 << 24, "2 to 16,777,216"),
            number("learning_rate", rate, rate > 0.0 && rate <= 1e3, "a positive number, at most 1,000"),
            number("adam_beta1", self.adam_beta1, (0.0..1.0).contains(&self.adam_beta1), "in [0, 1)"),
            number("adam_beta2", self.adam_beta2, (0.0..1.0).contains(&self.adam_beta2), "in [0, 1)"),
            number("adam_epsilon", self.adam_epsilon, self.adam_epsilon > 0.0 && self.adam_epsilon <= 1.0, "in (0, 1]"),
            number("weight_decay", decay, (0.0..=1e3).contains(&decay), "0 to 1,000"),
            number("max_grad_norm", self.max_grad_norm, (0.0..=1e9).contains(&self.max_grad_norm), "0 (off) to 1e9"),
        ];
        match checks.into_iter().find(|c| !c.2) {
            Some((key, value, _, expected)) => Err(TrainError::Config { key, value, expected }),
            None => Ok(()),
        }
    }

    fn validate_router(&self, router: RouterTraining) -> Result<(), TrainError> {
        router.validate()?;
        if self.zero_stage > 0 {
            let value = self.zero_stage.to_string();
            return Err(TrainError::Config { key: "zero_stage", value, expected: "0 for routers, which are small" });
        }
        let set = [
            ("lora", self.lora.is_some()),
            ("full", self.full.is_some()),
            ("olora", self.olora.is_some()),
            ("initial_adapter", self.initial_adapter.is_some()),
            ("keep_checkpoints", self.keep_checkpoints > 0),
        ];
        let wrong = |key, value: &str, expected| Err(TrainError::Config { key, value: value.to_owned(), expected });
        if let Some((key, _)) = set.into_iter().find(|(_, set)| *set) {
            return wrong(key, "set together with `router`", "no such key, because only the routers are trained");
        }
        if self.activation_checkpointing && router.has_losses() {
            // The router logits of recomputed layers exist only in the backward pass, one layer at a time.
            let expected = "false, or coefficients of 0 in [router]";
            return wrong("activation_checkpointing", "true with auxiliary losses of routers", expected);
        }
        Ok(())
    }

    fn validate_olora(&self) -> Result<(), TrainError> {
        let Some(olora) = &self.olora else { return Ok(()) };
        olora.validate().map_err(cl_model::ModelError::from)?;
        let wrong = |value: &str, expected| Err(TrainError::Config { key: "olora", value: value.to_owned(), expected });
        let Some(lora) = &self.lora else { return wrong("set without `lora`", "[train.lora]") };
        match lora.beyond_factors().filter(|_| olora.shape == SequenceShape::Stack) {
            Some(key) => wrong(&format!("shape = \"stack\" with `{key}`"), "shape = \"fold\", or adapters without it"),
            None => Ok(()),
        }
    }

    /// Options for loading the model for this round.
    pub fn load_options(&self, device: Device) -> LoadOptions {
        let compute = cl_torch::kind(self.precision);
        let adapters = cl_torch::kind(self.adapter_precision.unwrap_or(self.precision));
        let master = self.full.is_some() && self.states == States::F32;
        let quantization = self.lora.as_ref().and_then(|lora| lora.base);
        LoadOptions { weights: if master { Kind::Float } else { compute }, compute, adapters, quantization, device }
    }
}

/// Returns a setting of an adapter that reads the base's weights when training starts, if there is one.
fn needs_weights(lora: &LoraConfig) -> Option<&'static str> {
    let from_weights = matches!(lora.init_lora_weights, InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora);
    lora.beyond_factors().or(from_weights.then_some("init_lora_weights"))
}

fn is_zero(n: &u8) -> bool {
    *n == 0
}

fn is_none_kept(n: &usize) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_configuration_reads_back_also_without_a_longest_example() {
        let config = TrainConfig { max_length: None, full: Some(Full {}), ..TrainConfig::default() };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), config);
        // TOML has no null: like all unset options, the key is omitted.
        assert!(!toml::to_string(&config).unwrap().contains("max_length"));
    }
}
