use std::path::Path;

use cl_adapters::Targets;
use cl_checkpoint::{Adapter, Checkpoint, Manifest, ManifestProblem, TensorSource, convert};
use cl_data::{Dataset, Mixture, Profile, Tokenizer, plan};
use cl_model::Decoder;
use cl_train::{Plan, TrainConfig};

use crate::round_data::load_train_data;
use crate::sequence::{load_tasks, load_training};
use crate::{LabError, SequenceConfig, TrainRun};

/// Something a check has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A fact of the plan: sizes, steps.
    Fact(String),
    /// Something that would stop the run.
    Problem(String),
}

/// Checks a sequence without running it: model, tokenizer, data, tasks, adapter targets, device; all problems at once.
pub fn check_sequence(config: &SequenceConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    check_model(&config.model, &config.train, &mut findings);
    check_device(&config.device, &mut findings);
    if let Some(datasets) = note(load_training(config), &mut findings) {
        for (i, task) in config.tasks.iter().enumerate() {
            let used = if config.replay.is_some() { &datasets[..=i] } else { &datasets[i..=i] };
            check_plan(
                &format!("round {} ({task})", i + 1),
                used,
                &config.mixture(),
                &config.train,
                config.profile,
                &mut findings,
            );
        }
    }
    if let Some(tasks) = note(load_tasks(config), &mut findings) {
        for task in tasks {
            let fact = format!("scored: {}, {} documents, {}", task.name(), task.len(), task.main_metric());
            findings.push(Finding::Fact(fact));
        }
    }
    findings
}

/// Checks one round without running it.
pub fn check_train(config: &TrainRun) -> Vec<Finding> {
    let mut findings = Vec::new();
    check_model(&config.model, &config.train, &mut findings);
    check_device(&config.device, &mut findings);
    if let Some(datasets) = note(load_train_data(config), &mut findings) {
        check_plan("the round", &datasets, &config.mixture(), &config.train, config.profile, &mut findings);
    }
    findings
}

/// Checks a model or adapter directory: every header, names and shapes against the config, the tokenizer, every value for NaN
/// and infinities, and every file against the manifest when there is one.
pub fn check_directory(dir: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    if dir.join("adapter_config.json").exists() {
        check_adapter(dir, &mut findings);
    } else {
        check_whole_model(dir, &mut findings);
    }
    if dir.join("manifest.json").exists()
        && let Some(differences) = note(Manifest::verify(dir).map_err(LabError::from), &mut findings)
    {
        findings.extend(differences.into_iter().map(|difference| match difference {
            ManifestProblem::Missing(path) => {
                Finding::Problem(format!("{}: named in manifest.json, but missing", path.display()))
            }
            ManifestProblem::Changed(path) => {
                Finding::Problem(format!("{}: has another content than manifest.json says", path.display()))
            }
            ManifestProblem::Unlisted(path) => Finding::Fact(format!("{}: not named in manifest.json", path.display())),
        }));
    }
    findings
}

fn check_whole_model(dir: &Path, findings: &mut Vec<Finding>) {
    let tokenizer = note(Tokenizer::from_dir(dir).map_err(LabError::from), findings);
    let Some(checkpoint) = note(Checkpoint::open(dir).map_err(LabError::from), findings) else { return };
    if let Some(config) = note(Decoder::check(&checkpoint).map_err(LabError::from), findings) {
        findings.push(Finding::Fact(format!(
            "model: {:?} family, {} layers, hidden size {}, {:.1} M parameters, vocabulary {}",
            config.family,
            config.num_hidden_layers,
            config.hidden_size,
            parameters(&checkpoint) as f64 / 1e6,
            config.vocab_size
        )));
        let tokens = tokenizer.map_or(0, |t| t.vocab_size());
        if tokens as i64 > config.vocab_size {
            findings.push(Finding::Problem(format!(
                "{}: the tokenizer has {tokens} tokens, the embedding only {} rows",
                dir.display(),
                config.vocab_size
            )));
        }
    }
    note(checkpoint.check_all_finite().map_err(LabError::from), findings);
}

fn check_adapter(dir: &Path, findings: &mut Vec<Finding>) {
    let Some(adapter) = note(Adapter::open(dir).map_err(LabError::from), findings) else { return };
    note(cl_adapters::check_supported(&adapter).map_err(LabError::from), findings);
    let config = adapter.config();
    findings.push(Finding::Fact(format!(
        "adapter: {} on {} modules, r {}, lora_alpha {}, base {}",
        config.peft_type,
        adapter.modules().len(),
        config.r,
        config.lora_alpha,
        config.base_model_name_or_path.as_deref().unwrap_or("not named")
    )));
    for name in adapter.names() {
        let values = adapter.info(name).zip(adapter.bytes(name).ok()).and_then(|(i, b)| convert::to_f32(i.dtype, b));
        let bad = values.iter().flatten().enumerate().find(|(_, v)| !v.is_finite());
        if let Some((index, value)) = bad {
            let file = dir.join("adapter_model.safetensors");
            findings.push(Finding::Problem(format!("{}: tensor `{name}`: element {index} is {value}", file.display())));
        }
    }
}

fn parameters(checkpoint: &Checkpoint) -> usize {
    checkpoint.names().iter().filter_map(|n| checkpoint.info(n)).map(|i| i.elements()).sum()
}

fn note<T>(result: Result<T, LabError>, findings: &mut Vec<Finding>) -> Option<T> {
    result.map_err(|e| findings.push(Finding::Problem(e.to_string()))).ok()
}

fn check_device(device: &str, findings: &mut Vec<Finding>) {
    if let Err(e) = cl_torch::pick_device(device) {
        findings.push(Finding::Problem(e.to_string()));
    }
}

fn check_model(dir: &Path, train: &TrainConfig, findings: &mut Vec<Finding>) {
    if let Some(tokenizer) = note(Tokenizer::from_dir(dir).map_err(LabError::from), findings) {
        note(tokenizer.require_eos().map(|_| ()).map_err(LabError::from), findings);
    }
    let Some(checkpoint) = note(Checkpoint::open(dir).map_err(LabError::from), findings) else { return };
    note(Decoder::check(&checkpoint).map_err(LabError::from), findings);
    let millions = parameters(&checkpoint) as f64 / 1e6;
    findings.push(Finding::Fact(format!("model: {} with {millions:.1} M parameters", dir.display())));
    if let Some(lora) = &train.lora {
        // Adapters go beside matrices of the layers; embeddings are matrices too, but no linear layers.
        let names: Vec<&str> = checkpoint
            .names()
            .into_iter()
            .filter(|n| checkpoint.info(n).is_some_and(|i| i.shape.len() == 2) && !n.contains("embed_tokens"))
            .filter_map(|n| n.strip_suffix(".weight"))
            .collect();
        note(Targets::new(&lora.target_modules, &names).map(|_| ()).map_err(LabError::from), findings);
    }
    if let Some(dir) = &train.initial_adapter {
        note(Adapter::open(dir).map(|_| ()).map_err(LabError::from), findings);
    }
}

fn check_plan(
    what: &str,
    datasets: &[Dataset],
    mixture: &Mixture,
    train: &TrainConfig,
    profile: Profile,
    findings: &mut Vec<Finding>,
) {
    let sizes: Vec<usize> = datasets.iter().map(|d| d.examples.len()).collect();
    let lengths = plan(&sizes, mixture);
    let steps = Plan::new(lengths.iter().sum(), train, profile == Profile::Paper).map_err(LabError::from);
    if let Some(steps) = note(steps, findings) {
        let rows: Vec<String> =
            datasets.iter().zip(&lengths).filter(|(_, l)| **l > 0).map(|(d, l)| format!("{l} of {}", d.name)).collect();
        findings.push(Finding::Fact(format!(
            "{what}: rows an epoch: {}; {} steps an epoch, {} in all",
            rows.join(", "),
            steps.steps_per_epoch,
            steps.total_steps
        )));
    }
}
