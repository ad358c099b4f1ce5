//! Writing what a round has trained: an adapter, or a model after full fine-tuning.

use std::path::Path;

use cl_adapters::{LoraConfig, save_lora};
use cl_checkpoint::{Adapter, BaseExperts, Checkpoint, HubSnapshot, Manifest, TensorSource};
use cl_model::Decoder;
use cl_torch::tch::Kind;
use cl_train::TrainError;
use serde_json::{Value, json};

use crate::model_dir::adapter_hash;
use crate::{LabError, RoundInput};

/// Everything that is written with the trained weights.
pub(crate) struct Trained<'a> {
    base: &'a Checkpoint,
    /// Name of the base model in an adapter's configuration.
    base_name: String,
    /// Settings of the adapter; `None` for full fine-tuning.
    lora: Option<LoraConfig>,
    /// Names and contents of files that a model takes over from its base.
    companions: Vec<(String, Vec<u8>)>,
    manifest: Manifest,
}

impl<'a> Trained<'a> {
    /// Reads what is needed from the base and the initial adapter.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read.
    pub(crate) fn new(input: &RoundInput<'_>, base: &'a Checkpoint) -> Result<Trained<'a>, LabError> {
        let lora = match (&input.config.lora, &input.config.initial_adapter) {
            // An initial adapter determines rank and scaling, and the saved config must have the same values.
            (Some(lora), Some(dir)) => Some(lora.continued(&Adapter::open(dir)?)),
            (lora, _) => lora.clone(),
        };
        let companions = if lora.is_some() { Vec::new() } else { companions(base)? };
        let manifest = manifest(input, if lora.is_some() { "adapter" } else { "model" })?;
        Ok(Trained { base, base_name: HubSnapshot::model_name(input.model.dir()), lora, companions, manifest })
    }

    /// Writes the adapter or the model to `dir`, replacing it. The manifest of a model or adapter that is not the
    /// result of the round has the number of completed steps.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be written.
    pub(crate) fn save(&self, model: &Decoder, dir: &Path, step: Option<u64>) -> Result<(), TrainError> {
        let mut manifest = self.manifest.clone();
        if let (Some(step), Some(Value::Object(config))) = (step, &mut manifest.config) {
            config.insert("step".to_owned(), json!(step));
        }
        match &self.lora {
            Some(lora) => {
                save_lora(dir, model.sites(), &model.trained_whole(), lora, &self.base_name, manifest, true)?;
                if step.is_none() {
                    warn_of_experts(model, dir);
                }
            }
            None => {
                let kind = model.named_parameters()[0].1.kind();
                let stored = stored_kind(self.base).unwrap_or(kind);
                model.save(dir, stored, self.base.config(), &self.companions, manifest, true)?;
            }
        }
        Ok(())
    }
}

/// Warns if PEFT has no format for an adapter of fused experts, which it would load without the experts' factors.
fn warn_of_experts(model: &Decoder, dir: &Path) {
    let of_experts = |name: &str| !BaseExperts::of([name]).is_empty();
    let mut loras = model.sites().filter(|site| of_experts(site.name)).filter_map(|site| site.lora);
    if loras.any(|lora| lora.magnitude.is_some() || lora.bias.is_some()) {
        tracing::warn!(
            "{}: PEFT cannot apply use_dora and lora_bias to the fused experts of Transformers 5; fold this adapter to use \
             it there",
            dir.display()
        );
    }
}

/// Returns the dtype of the base's embedding, in which the result is saved.
fn stored_kind(checkpoint: &Checkpoint) -> Option<Kind> {
    cl_torch::kind_of(checkpoint.info("model.embed_tokens.weight")?.dtype)
}

fn companions(checkpoint: &Checkpoint) -> Result<Vec<(String, Vec<u8>)>, LabError> {
    checkpoint
        .companion_files()?
        .into_iter()
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, std::fs::read(&path).map_err(LabError::io(&path))?))
        })
        .collect()
}

fn manifest(input: &RoundInput<'_>, kind: &str) -> Result<Manifest, LabError> {
    let base = input.model;
    let mut manifest = Manifest::new(kind).with_source("base", base.dir(), base.hash().to_owned());
    for data in input.datasets() {
        manifest = manifest.with_source("data", &data.path, data.hash.clone());
    }
    if let Some(dir) = &input.config.initial_adapter {
        manifest = manifest.with_source("initial_adapter", dir, adapter_hash(dir)?);
    }
    for dir in input.earlier {
        manifest = manifest.with_source("earlier_adapter", dir, adapter_hash(dir)?);
    }
    let mut config =
        json!({"train": input.config, "mixture": input.mixture, "seed": input.seed, "profile": input.profile});
    if let Some(validation) = &input.validation {
        config["validation"] = json!(validation.config);
        for data in validation.data.iter().filter(|_| validation.config.data.is_some()) {
            manifest = manifest.with_source("validation", &data.path, data.hash.clone());
        }
    }
    Ok(manifest.with_config(config))
}
