//! Shared by the examples: a small Llama that knows facts and the form of the tasks' questions, and the tasks as files.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cl_adapters::LoraConfig;
use cl_checkpoint::{Interrupt, Manifest};
use cl_data::{Example, Mixture, Profile, Split, load_split};
use cl_lab::{EvalConfig, Event, Limits, MixtureConfig, ModelRef, RoundInput, SequenceConfig, run_round, toy};
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::{Device, Kind};
use cl_train::{Full, Ranks, Schedule, TrainConfig};
use serde_json::json;

/// Random seed of everything.
pub const SEED: u64 = 1;

/// Facts, questions about them, and tasks, as files. Returns the files of questions: the old knowledge.
pub fn write_data(data: &Path) -> Result<Vec<PathBuf>> {
    write_split(&data.join("pretraining"), "train", &toy::pretraining(SEED, 300))?;
    for task in toy::tasks(SEED, 320, 100) {
        write_split(&data.join(task.name), "train", &task.train)?;
        write_split(&data.join(task.name), "test", &task.test)?;
    }
    let mut files = Vec::new();
    for (name, questions) in toy::facts(SEED).questions {
        let lines: Vec<String> = questions.iter().map(|q| json!(q).to_string()).collect();
        files.push(data.join(format!("{name}.jsonl")));
        std::fs::write(files.last().expect("just pushed"), lines.join("\n"))?;
    }
    Ok(files)
}

fn write_split(dir: &Path, split: &str, examples: &[Example]) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    Ok(std::fs::write(dir.join(format!("{split}.json")), json!(examples).to_string())?)
}

/// Random weights, then all of them trained on what the model is to know beforehand.
pub fn pretrain(folder: &Path, data: &Path) -> Result<PathBuf> {
    let config = toy::model_config(96);
    let init = folder.join("init");
    random_weights(&config, SEED, LoadOptions::cpu(Kind::Float))?.save(
        &init,
        Kind::Float,
        &config,
        &toy::tokenizer_files(),
        Manifest::new("model"),
        false,
    )?;
    let train = TrainConfig {
        epochs: 30,
        micro_batch_size: 16,
        learning_rate: 3e-3,
        lr_scheduler_type: Schedule::Cosine,
        full: Some(Full {}),
        ..TrainConfig::default()
    };
    let input = RoundInput {
        model: &ModelRef::take(&init)?,
        interrupt: &Interrupt::default(),
        finish: false,
        ranks: &Ranks::alone(),
        data: &[load_split(&data.join("pretraining"), Split::Train)?],
        earlier_data: &[],
        mixture: &Mixture::default(),
        config: &train,
        validation: None,
        seed: SEED,
        buffer_seed: SEED,
        profile: Profile::Method,
        device: Device::Cpu,
        compose: None,
        earlier: &[],
    };
    Ok(run_round(&input, &folder.join("base"), &mut say)?.model)
}

/// Tasks in order with LoRA on every linear layer, all of them scored after every round.
pub fn sequence(base: &Path, data: &Path, tasks: &[&str]) -> SequenceConfig {
    SequenceConfig {
        model: base.to_owned(),
        data: data.to_owned(),
        tasks: tasks.iter().map(|&task| task.to_owned()).collect(),
        seed: SEED,
        profile: Profile::Method,
        device: "cpu".to_owned(),
        keep_models: false,
        limit: Limits::default(),
        train: TrainConfig {
            epochs: 20,
            micro_batch_size: 16,
            learning_rate: 2e-3,
            lora: Some(LoraConfig::default()),
            ..TrainConfig::default()
        },
        validation: None,
        mixture: MixtureConfig::default(),
        replay: None,
        eval: EvalConfig { max_new_tokens: Some(4), ..EvalConfig::default() },
        rounds: Vec::new(),
    }
}

/// Names of stages, to stderr.
pub fn say(event: Event<'_>) {
    if let Event::Stage(name) = event {
        eprintln!("  {name}");
    }
}
