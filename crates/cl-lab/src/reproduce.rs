use std::path::{Path, PathBuf};

use cl_adapters::LoraConfig;
use cl_checkpoint::files::write_file;
use cl_checkpoint::{Interrupt, Manifest};
use cl_data::{Buffer, Mixture, Profile, Replay, Split, load_split};
use cl_eval::{Group, ScoreMatrix, Table, summary_table, table_of};
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::{Device, Kind};
use cl_train::{Full, TrainConfig};
use serde_json::json;

use crate::observe::tell;
use crate::output::RunDir;
use crate::report::method_name;
use crate::toy;
use crate::{
    EvalConfig, Event, LabError, Limits, MixtureConfig, ModelRef, Observer, RoundInput, SequenceConfig, run_round,
    run_sequence,
};

/// Settings of the built-in experiment: a small model is pretrained on facts, then trained on four tasks in sequence,
/// with three methods.
#[derive(Clone, Debug, PartialEq)]
pub struct StudyConfig {
    /// Random seed.
    pub seed: u64,
    /// Hidden size of the model.
    pub hidden_size: usize,
    /// Number of questions of each task in the pretraining data, with random answers.
    pub pretraining_questions: usize,
    /// Epochs of pretraining.
    pub pretraining_epochs: u64,
    /// Number of training rows per task.
    pub train_rows: usize,
    /// Number of test documents per task.
    pub test_rows: usize,
    /// Epochs per task.
    pub epochs: u64,
    /// Learning rate of LoRA.
    pub lora_learning_rate: f64,
    /// Learning rate of full fine-tuning.
    pub full_learning_rate: f64,
    /// Fraction of replayed rows.
    pub replay: f64,
}

impl Default for StudyConfig {
    fn default() -> Self {
        StudyConfig {
            seed: 1,
            hidden_size: 96,
            pretraining_questions: 300,
            pretraining_epochs: 30,
            train_rows: 480,
            test_rows: 120,
            epochs: 20,
            lora_learning_rate: 2e-3,
            full_learning_rate: 5e-4,
            replay: 0.1,
        }
    }
}

/// Results of the built-in experiment.
pub struct Study {
    /// Tables in the layout of the paper's Tables 1 to 4, the same for replay, and a summary.
    pub tables: Vec<Table>,
    /// The score matrix of each sequence, by name.
    pub matrices: Vec<(String, ScoreMatrix)>,
}

/// Runs the built-in experiment in `out`: `data/`, `base/`, `sequences/<method>/` and `tables.md`. Completed stages are
/// kept, so that an interrupted experiment resumes.
///
/// # Errors
/// Returns [`LabError::Output`] if `out` contains anything else, and an error if a stage fails.
pub fn reproduce(
    config: &StudyConfig,
    out: &Path,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<Study, LabError> {
    let settings = format!("{config:#?}\n");
    let (sources, inputs, marker) = (&[], &[], "study.txt");
    let dir = RunDir { out, what: "study", marker, settings: &settings, sources, inputs, resume: true };
    let _lock = dir.open()?;
    let data = out.join("data");
    let questions = write_data(config, &data)?;
    tell(observer, Event::Stage("pretraining a small model on facts"));
    let base = pretrain(config, out, &data, interrupt, observer)?;
    let mut matrices = Vec::new();
    for (lora, replay) in [(false, false), (true, false), (true, true)] {
        let sequence = sequence(config, &base, &data, &questions, lora, replay);
        let name = method_name(&sequence);
        tell(observer, Event::Stage(&format!("sequence {name}")));
        let report = run_sequence(&sequence, &out.join("sequences").join(&name), true, interrupt, observer)?;
        matrices.push((name, report.matrix));
    }
    let tables = tables(&matrices);
    let markdown: Vec<String> = tables.iter().map(Table::markdown).collect();
    write_file(&out.join("tables.md"), markdown.join("\n").as_bytes())?;
    Ok(Study { tables, matrices })
}

/// Writes facts, questions and tasks as files; returns the files of questions.
pub(crate) fn write_data(config: &StudyConfig, data: &Path) -> Result<Vec<PathBuf>, LabError> {
    let facts = toy::facts(config.seed);
    write_split(&data.join("pretraining"), "train", &toy::pretraining(config.seed, config.pretraining_questions))?;
    let mut files = Vec::new();
    for (name, questions) in &facts.questions {
        let path = data.join(format!("{name}.jsonl"));
        let lines: Vec<String> = questions.iter().map(|q| json!(q).to_string()).collect();
        write_file(&path, (lines.join("\n") + "\n").as_bytes())?;
        files.push(path);
    }
    for task in toy::tasks(config.seed, config.train_rows, config.test_rows) {
        write_split(&data.join(task.name), "train", &task.train)?;
        write_split(&data.join(task.name), "test", &task.test)?;
    }
    Ok(files)
}

fn write_split(dir: &Path, split: &str, examples: &[cl_data::Example]) -> Result<(), LabError> {
    std::fs::create_dir_all(dir).map_err(LabError::io(dir))?;
    Ok(write_file(&dir.join(format!("{split}.json")), json!(examples).to_string().as_bytes())?)
}

/// Pretrains a randomly initialized model.
fn pretrain(
    config: &StudyConfig,
    out: &Path,
    data: &Path,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<PathBuf, LabError> {
    let init = out.join("base/init");
    let keys = toy::model_config(config.hidden_size);
    if !init.join("manifest.json").exists() {
        let model = random_weights(&keys, config.seed, LoadOptions::cpu(Kind::Float))?;
        model.save(&init, Kind::Float, &keys, &toy::tokenizer_files(), Manifest::new("model"), true)?;
    }
    let datasets = [load_split(&data.join("pretraining"), Split::Train)?];
    let train = TrainConfig {
        epochs: config.pretraining_epochs,
        micro_batch_size: 16,
        learning_rate: 3e-3,
        lr_scheduler_type: cl_train::Schedule::Cosine,
        warmup_steps: 10,
        save_steps: 200,
        full: Some(Full {}),
        ..TrainConfig::default()
    };
    let input = RoundInput {
        model: &ModelRef::take(&init)?,
        interrupt,
        data: &datasets,
        earlier_data: &[],
        mixture: &Mixture::default(),
        config: &train,
        validation: None,
        seed: config.seed,
        buffer_seed: config.seed,
        profile: Profile::Method,
        device: Device::Cpu,
        compose: None,
        earlier: &[],
    };
    Ok(run_round(&input, &out.join("base"), observer)?.model)
}

fn sequence(
    config: &StudyConfig,
    base: &Path,
    data: &Path,
    questions: &[PathBuf],
    lora: bool,
    replay: bool,
) -> SequenceConfig {
    let names = ["first", "mood", "largest", "last"].map(str::to_owned).to_vec();
    SequenceConfig {
        model: base.to_owned(),
        data: data.to_owned(),
        tasks: names,
        seed: config.seed,
        profile: Profile::Method,
        device: "cpu".to_owned(),
        keep_models: true,
        limit: Limits::default(),
        train: TrainConfig {
            epochs: config.epochs,
            micro_batch_size: 16,
            learning_rate: if lora { config.lora_learning_rate } else { config.full_learning_rate },
            save_steps: 100,
            lora: lora.then(LoraConfig::default),
            full: (!lora).then_some(Full {}),
            ..TrainConfig::default()
        },
        validation: None,
        mixture: MixtureConfig::default(),
        replay: replay.then_some(Replay { fraction: config.replay, buffer: Buffer::Redrawn }),
        eval: EvalConfig {
            old: questions.iter().map(|p| p.display().to_string()).collect(),
            max_new_tokens: Some(4),
            batch_sequences: 128,
            ..EvalConfig::default()
        },
        rounds: Vec::new(),
    }
}

/// The paper's Tables 1 to 4 (full fine-tuning and LoRA on old and new knowledge), the same for replay, and a summary.
fn tables(matrices: &[(String, ScoreMatrix)]) -> Vec<Table> {
    let of = |name: &str, group: Group, caption: String| {
        let matrix = &matrices.iter().find(|m| m.0 == name).expect("every sequence was run").1;
        table_of(matrix, group, &caption)
    };
    let old = |m: &str| format!("{m}: impact on old knowledge across successive tasks.");
    let new = |m: &str| format!("{m}: acquisition and retention of new knowledge across successive tasks.");
    let mut tables: Vec<Table> = [
        of("FFT", Group::Old, format!("Table 1. {}", old("Full fine-tuning"))),
        of("LoRA", Group::Old, format!("Table 2. {}", old("LoRA"))),
        of("FFT", Group::New, format!("Table 3. {}", new("Full fine-tuning"))),
        of("LoRA", Group::New, format!("Table 4. {}", new("LoRA"))),
        of("LoRA-Rep", Group::Old, old("LoRA with replay")),
        of("LoRA-Rep", Group::New, new("LoRA with replay")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let rows: Vec<(String, &ScoreMatrix)> = matrices.iter().map(|(n, m)| (n.clone(), m)).collect();
    let caption =
        "After the last round, over all tasks (profile method; a small model and tasks of the project's own making).";
    tables.push(summary_table(&rows, caption));
    tables
}
