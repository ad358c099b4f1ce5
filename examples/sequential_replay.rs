//! A small Llama learns four tasks one after another, with LoRA alone and with 10 % replay. What does it forget?
//!
//! ```text
//! cargo run --example sequential_replay
//! ```
//!
//! Everything is made here from a seed: facts to know beforehand, tasks, tokenizer, weights. It takes about a minute on two
//! cores and needs no network and no data.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use cl_adapters::LoraConfig;
use cl_checkpoint::Manifest;
use cl_data::{Example, Mixture, Profile, Split, load_split};
use cl_eval::{Group, ScoreMatrix};
use cl_lab::{EvalConfig, Event, Limits, Replay, RoundInput, SequenceConfig, run_round, run_sequence, tables_of, toy};
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::{self, Device, Kind};
use cl_train::{Full, Schedule, TrainConfig};
use serde_json::json;

const SEED: u64 = 1;
const TASKS: [&str; 4] = ["first", "mood", "largest", "last"];

fn main() -> Result<()> {
    // So small a model gains little from more threads, and on a busy machine threads that wait for each other cost minutes.
    tch::set_num_threads(1);
    let started = Instant::now();
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("data");
    let questions = write_data(&data)?;

    eprintln!("pretraining a small Llama on facts and on the form of the tasks' questions");
    let base = pretrain(folder.path(), &data)?;

    let mut results = Vec::new();
    for replay in [None, Some(Replay { fraction: 0.1 })] {
        let name = if replay.is_some() { "LoRA-Rep" } else { "LoRA" };
        let config = sequence(&base, &data, &questions, replay);
        let report = run_sequence(&config, &folder.path().join(name), false, &mut say)?;
        for table in tables_of(&report.matrix, name, config.profile) {
            println!("{}", table.text());
        }
        results.push(report.matrix);
    }
    compare(&results[0], &results[1]);
    eprintln!("{:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Facts, questions about them, and tasks, as files. Returns the files of questions: the old knowledge.
fn write_data(data: &Path) -> Result<Vec<PathBuf>> {
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
fn pretrain(folder: &Path, data: &Path) -> Result<PathBuf> {
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
        model: &init,
        datasets: &[load_split(&data.join("pretraining"), Split::Train)?],
        mixture: Mixture::None,
        config: &train,
        seed: SEED,
        profile: Profile::Method,
        device: Device::Cpu,
        compose: None,
    };
    Ok(run_round(&input, &folder.join("base"), &mut say)?.model)
}

/// The four tasks in order, LoRA on every linear layer, all tasks and facts scored after every round.
fn sequence(base: &Path, data: &Path, questions: &[PathBuf], replay: Option<Replay>) -> SequenceConfig {
    SequenceConfig {
        model: base.to_owned(),
        data: data.to_owned(),
        tasks: TASKS.map(str::to_owned).to_vec(),
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
        replay,
        eval: EvalConfig {
            old: questions.iter().map(|q| q.display().to_string()).collect(),
            max_new_tokens: Some(4),
            ..EvalConfig::default()
        },
    }
}

/// What replay changed.
fn compare(without: &ScoreMatrix, with: &ScoreMatrix) {
    let show = |v: Option<f64>| v.map_or("–".to_owned(), |v| format!("{v:+.3}"));
    let last = |m: &ScoreMatrix, group| m.mean(m.rows.len() - 1, group);
    println!("What replay changed:            without     with");
    let row = |name: &str, figure: &dyn Fn(&ScoreMatrix) -> Option<f64>| {
        println!("  {name:<28}  {:>8} {:>8}", show(figure(without)), show(figure(with)));
    };
    row("new knowledge at the end", &|m| last(m, Group::New));
    row("old knowledge at the end", &|m| last(m, Group::Old));
    row("backward transfer (absolute)", &|m| m.mean_of(ScoreMatrix::absolute_bwt));
    row("forgetting", &|m| m.mean_of(ScoreMatrix::forgetting));
}

fn say(event: Event<'_>) {
    if let Event::Stage(name) = event {
        eprintln!("  {name}");
    }
}
