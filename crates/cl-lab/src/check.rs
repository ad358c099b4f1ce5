use std::path::Path;

use cl_adapters::Targets;
use cl_checkpoint::{Adapter, Checkpoint, TensorSource};
use cl_data::{Dataset, Mixture, Profile, Tokenizer, plan};
use cl_model::ModelConfig;
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
    let config = ModelConfig::from_json(dir, checkpoint.config());
    note(config.map_err(LabError::from), findings);
    let parameters: usize = checkpoint.names().iter().filter_map(|n| checkpoint.info(n)).map(|i| i.elements()).sum();
    findings.push(Finding::Fact(format!("model: {} with {:.1} M parameters", dir.display(), parameters as f64 / 1e6)));
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
