//! The built-in study: a small Llama model and seven tasks, all generated from a seed.
//!
//! The model is pretrained on facts about forty people, and on questions of every task with random answers of the right
//! form. Like a pretrained model, it then knows the vocabulary and the form of the questions, but not the tasks. Some
//! facts occur once and others often, so that the model knows most of them but not all.

mod tasks;
mod words;

use std::path::{Path, PathBuf};

use cl_checkpoint::files::write_file;
use cl_checkpoint::{Interrupt, Manifest};
use cl_data::{Example, Mixture, Profile, Split, load_split};
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::{Device, Kind};
use cl_train::{Full, Ranks, TrainConfig};
use serde::Serialize;
use serde_json::json;

use self::tasks::TASKS;
use self::words::{COLOURS, PLACES, SUBJECTS, TRADES, vocabulary};
use super::config::{ColumnConfig, Comparison, StudyConfig};
use super::directory::{take_alone, take_shared};
use crate::problem::OutputProblem;
use crate::toy::{below, rng, small_llama, word_tokenizer};
use crate::{EvalConfig, LabError, Limits, ModelRef, Observer, RoundConfig, RoundInput, run_round};

/// Length of the longest text in tokens.
const MAX_LENGTH: usize = 48;

/// Size of the tiny study.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TinyConfig {
    /// Random seed for facts, tasks and the base model.
    pub seed: u64,
    /// Training seeds; the main comparisons are repeated with each.
    pub seeds: Vec<u64>,
    /// Width of the model.
    pub hidden_size: usize,
    /// Number of passes over the pretraining data.
    pub pretraining_epochs: u64,
    /// Number of questions per task in the pretraining data.
    pub pretraining_questions: usize,
    /// Number of training rows per task; arithmetic has ten times as many.
    pub train_rows: usize,
    /// Number of test documents per task.
    pub test_rows: usize,
    /// Number of passes over a task's rows; arithmetic gets three tenths of it.
    pub epochs: u64,
    /// Whether to run only what the paper's tables compare, without the open questions.
    pub quick: bool,
}

impl Default for TinyConfig {
    fn default() -> Self {
        TinyConfig {
            seed: 1,
            seeds: vec![1, 2, 3],
            hidden_size: 96,
            pretraining_epochs: 10,
            pretraining_questions: 150,
            train_rows: 256,
            test_rows: 60,
            epochs: 10,
            quick: false,
        }
    }
}

impl TinyConfig {
    /// Returns a smaller study: one seed, fewer rows, and only the main comparisons.
    pub fn quick() -> TinyConfig {
        TinyConfig { seeds: vec![1], test_rows: 40, quick: true, ..TinyConfig::default() }
    }

    /// Returns the configuration of the study, with model and data in `out`.
    pub fn study(&self, out: &Path) -> StudyConfig {
        let data = out.join("data");
        let table = |text: &str| toml::from_str(text).expect("a constant table");
        let math_epochs = (self.epochs * 3 / 10).max(1);
        let rounds = TASKS.iter().map(|task| RoundConfig {
            scored: Some(vec![format!("{}.toml", task.name)]),
            train: if task.times > 1 { table(&format!("epochs = {math_epochs}")) } else { toml::Table::new() },
            ..RoundConfig::of_task(task.name)
        });
        let mut columns: Vec<ColumnConfig> = TASKS
            .iter()
            .map(|task| ColumnConfig {
                name: task.name.to_owned(),
                chance: task.chance,
                paper: Some(task.paper.to_owned()),
            })
            .collect();
        columns.extend(FACTS.iter().map(|(name, ..)| ColumnConfig {
            name: (*name).to_owned(),
            chance: Some(1.0 / 8.0),
            paper: None,
        }));
        StudyConfig {
            name: "tiny".to_owned(),
            description:
                "A two-layer Llama model and seven tasks generated from seeds, instead of the paper's model and data."
                    .to_owned(),
            model: out.join("base/model"),
            model_name: format!("Llama of two layers, width {}", self.hidden_size),
            data: data.clone(),
            tasks: Vec::new(),
            rounds: rounds.collect(),
            seeds: self.seeds.clone(),
            profile: Profile::Method,
            device: "cpu".to_owned(),
            threads: Some(1),
            limit: Limits::default(),
            train: table(&format!("epochs = {}\nmicro_batch_size = 16\nsave_steps = 200", self.epochs)),
            lora: table("learning_rate = 2e-3\n[lora]\nr = 8\nlora_alpha = 8"),
            full: table("learning_rate = 5e-4"),
            router: table("learning_rate = 4e-3\nmax_steps = 60"),
            // The experts that correspond to the paper's four.
            experts: ["minutes", "code", "science", "math"].map(str::to_owned).to_vec(),
            joint: table(&format!("epochs = {math_epochs}")),
            eval: EvalConfig {
                old: FACTS.iter().map(|(name, ..)| format!("{name}.jsonl")).collect(),
                batch_sequences: 128,
                ..EvalConfig::default()
            },
            columns,
            compare: if self.quick { Comparison::of_paper().to_vec() } else { Comparison::ALL.to_vec() },
            ..StudyConfig::default()
        }
    }

    /// Writes facts, tasks and the pretrained model to `out`: `data/`, `base/`. Existing files are kept.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written or pretraining fails; [`LabError::is_interrupted`] tells whether a
    /// stop was requested.
    pub fn write_world(&self, out: &Path, interrupt: &Interrupt, observer: &mut Observer<'_>) -> Result<(), LabError> {
        let study = self.study(out);
        // If everything exists, other processes may already be running the study.
        let stands = out.join("base/model/manifest.json").exists();
        let _lock = if stands { take_shared(&study, out)? } else { take_alone(&study, out)? };
        self.claim_world(out)?;
        let data = out.join("data");
        self.write_data(&data)?;
        self.pretrain(out, &data, interrupt, observer)
    }

    /// Checks that the directory belongs to this configuration: mixing facts, tasks and base models of two
    /// configurations would invalidate the results of the first.
    fn claim_world(&self, out: &Path) -> Result<(), LabError> {
        let (path, own) = (out.join("tiny.json"), format!("{:#}\n", json!(self)));
        match std::fs::read_to_string(&path) {
            Ok(saved) if saved == own => Ok(()),
            Ok(_) => Err(LabError::Output { path: out.to_owned(), problem: OutputProblem::OtherTinyStudy }),
            Err(_) => Ok(write_file(&path, own.as_bytes())?),
        }
    }

    /// Writes facts, tasks and the base model before pretraining: enough to plan a study.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written.
    pub fn write_sketch(&self, out: &Path) -> Result<(), LabError> {
        self.write_data(&out.join("data"))?;
        self.write_untrained(&out.join("base/model"))
    }

    fn write_untrained(&self, dir: &Path) -> Result<(), LabError> {
        let words = vocabulary();
        let keys = small_llama(words.len(), self.hidden_size, MAX_LENGTH);
        let model = random_weights(&keys, self.seed, LoadOptions::cpu(Kind::Float))?;
        let tokenizer = word_tokenizer(&words, MAX_LENGTH);
        Ok(model.save(dir, Kind::Float, &keys, &tokenizer, Manifest::new("model"), true)?)
    }

    fn write_data(&self, data: &Path) -> Result<(), LabError> {
        let (facts, questions) = facts(self.seed);
        let asked = TASKS.iter().flat_map(|task| task.questions(self.seed, self.pretraining_questions));
        let before: Vec<Example> = facts.into_iter().chain(asked).collect();
        write_rows(&data.join("pretraining/train.json"), &before)?;
        for ((name, ..), questions) in FACTS.iter().zip(questions) {
            let lines: Vec<String> = questions.iter().map(ToString::to_string).collect();
            write_file(&data.join(format!("{name}.jsonl")), (lines.join("\n") + "\n").as_bytes())?;
        }
        for task in &TASKS {
            let (train, test) = task.rows(self.seed, self.train_rows, self.test_rows);
            write_rows(&data.join(task.name).join("train.json"), &train)?;
            write_rows(&data.join(task.name).join("test.json"), &test)?;
            let (name, metric, tokens) = (task.name, task.metric, task.answer_tokens + 1);
            let description = format!(
                "name = \"{name}\"\nmetric = \"{metric}\"\ntarget_delimiter = \"\"\n[files]\neval = [\"{name}/test\"]\n\
                 [generation]\nprompt = \"{{{{ prompt }}}}\"\ntarget = \"{{{{ answer }}}}\"\nmax_new_tokens = {tokens}\n"
            );
            write_file(&data.join(format!("{name}.toml")), description.as_bytes())?;
        }
        Ok(())
    }

    /// Creates a random model and pretrains all of its weights.
    fn pretrain(
        &self,
        out: &Path,
        data: &Path,
        interrupt: &Interrupt,
        observer: &mut Observer<'_>,
    ) -> Result<(), LabError> {
        let init = out.join("base/init");
        if !init.join("manifest.json").exists() {
            self.write_untrained(&init)?;
        }
        let train = TrainConfig {
            epochs: self.pretraining_epochs,
            micro_batch_size: 32,
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
            finish: false,
            ranks: &Ranks::alone(),
            data: &[load_split(&data.join("pretraining"), Split::Train)?],
            earlier_data: &[],
            mixture: &Mixture::default(),
            config: &train,
            seed: self.seed,
            buffer_seed: self.seed,
            profile: Profile::Method,
            device: Device::Cpu,
            compose: None,
            earlier: &[],
            validation: None,
        };
        run_round(&input, &out.join("base"), observer).map(|_| ())
    }
}

/// Sets of facts: name, the text before and after the subject, and the possible answers.
const FACTS: [(&str, [&str; 2], [&str; 8]); 3] = [
    ("homes", ["where does", "live ?"], PLACES),
    ("colours", ["which colour does", "like ?"], COLOURS),
    ("trades", ["what work has", "?"], TRADES),
];

/// Numbers of times that facts occur in the pretraining data, used in turn.
const TIMES: [usize; 5] = [1, 2, 3, 5, 8];

/// Returns the facts as training rows, each repeated as often as it occurs, and as multiple-choice questions.
fn facts(seed: u64) -> (Vec<Example>, Vec<Vec<serde_json::Value>>) {
    let mut rng = rng(seed, "facts");
    let mut rows = Vec::new();
    let questions = FACTS.iter().enumerate().map(|(set, (_, [before, after], answers))| {
        let question = |(i, subject): (usize, &&str)| {
            let (query, gold) = (format!("{before} {subject} {after}"), below(&mut rng, answers.len()));
            // How often facts about the same person occur in different sets is unrelated.
            let times = TIMES[(i * 7 + set * 3) % TIMES.len()];
            rows.extend(std::iter::repeat_n(Example::pair(query.clone(), answers[gold]), times));
            json!({"query": query, "choices": answers, "gold": gold})
        };
        SUBJECTS.iter().enumerate().map(question).collect::<Vec<_>>()
    });
    let questions = questions.collect();
    (rows, questions)
}

fn write_rows(path: &Path, rows: &[Example]) -> Result<(), LabError> {
    let dir: PathBuf = path.parent().map(Path::to_owned).unwrap_or_default();
    std::fs::create_dir_all(&dir).map_err(LabError::io(&dir))?;
    Ok(write_file(path, json!(rows).to_string().as_bytes())?)
}
