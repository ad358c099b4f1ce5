use std::path::PathBuf;

use cl_data::{Columns, Format, Joint, Mixture, Profile, Replay};
use cl_eval::Metric;
use cl_train::{Precision, TrainConfig};
use serde::{Deserialize, Deserializer, Serialize};

/// One round of fine-tuning: the file of `cl train`. Paths are taken from the current directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRun {
    /// Model directory to start from.
    pub model: PathBuf,
    /// Random seed.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Whose semantics.
    #[serde(default)]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// What to train on.
    pub data: DataConfig,
    /// How.
    pub train: TrainConfig,
    /// How several data sets share an epoch.
    #[serde(default, skip_serializing_if = "MixtureConfig::is_default")]
    pub mixture: MixtureConfig,
    /// Rows of `data.earlier` beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

/// Files of a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// A file of examples or a task directory with a train split, or a list of them.
    #[serde(deserialize_with = "one_or_several")]
    pub train: Vec<PathBuf>,
    /// How rows become examples.
    #[serde(default)]
    pub format: Format,
    /// Which fields of a row hold what, where they have names of their own.
    #[serde(default, skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Only the first so many rows of each file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Data of earlier rounds for replay, a file or task directory for each round.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<PathBuf>,
}

/// A sequence of rounds: the file of `cl sequence`. Paths are taken from the current directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceConfig {
    /// Model directory to start from.
    pub model: PathBuf,
    /// Directory of tasks, each with a train and a test split, as TRACE is laid out.
    pub data: PathBuf,
    /// Tasks in the order they are learned, one a round: the short form of `[[rounds]]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Random seed.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Whose semantics.
    #[serde(default)]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Keep the model of every round; otherwise only the last (adapters are kept in any case).
    #[serde(default = "yes")]
    pub keep_models: bool,
    /// How much of the data.
    #[serde(default)]
    pub limit: Limits,
    /// How a round goes.
    pub train: TrainConfig,
    /// How several data sets of one round share an epoch.
    #[serde(default, skip_serializing_if = "MixtureConfig::is_default")]
    pub mixture: MixtureConfig,
    /// Rows of earlier rounds beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
    /// What is scored after every round.
    #[serde(default)]
    pub eval: EvalConfig,
    /// Rounds that are more than a task each: their data, what shows their success, and what differs in `[train]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundConfig>,
}

/// One round of a sequence: an entry of `[[rounds]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundConfig {
    /// What the round is called; its directory is `rounds/<number>-<name>`.
    pub name: String,
    /// What to train on: task directories in `data`, or paths of task directories and files. The round's name when empty.
    #[serde(default, deserialize_with = "one_or_several", skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<PathBuf>,
    /// Tasks that show what the round teaches; the round's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scored: Option<Vec<String>>,
    /// How rows become examples.
    #[serde(default, skip_serializing_if = "is_auto")]
    pub format: Format,
    /// Which fields of a row hold what, where they have names of their own.
    #[serde(default, skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// How several data sets share an epoch, instead of the sequence's `[mixture]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joint: Option<Joint>,
    /// What differs from the sequence's `[train]`.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub train: toml::Table,
}

/// `[mixture]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// How several data sets of one round share an epoch.
    #[serde(default)]
    pub joint: Joint,
}

impl MixtureConfig {
    pub(crate) fn is_default(&self) -> bool {
        *self == MixtureConfig::default()
    }
}

/// How much of the data is used: the first rows of each file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Training rows of a task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<usize>,
    /// Test documents of a task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<usize>,
}

/// What is scored, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// New knowledge; what the rounds teach when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tasks: Option<Vec<String>>,
    /// Old knowledge: known tasks, or `.jsonl` files of multiple-choice questions.
    pub old: Vec<String>,
    /// Most tokens of a written answer; each task's own when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// Metric of tasks, instead of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Dtype while scoring.
    pub precision: Precision,
    /// Tokens of one forward pass.
    pub batch_tokens: usize,
    /// Sequences that are generated together.
    pub batch_sequences: usize,
    /// Whether BOS stands in front of every text; what the tokenizer does by itself when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_bos_token: Option<bool>,
    /// `add_bos_token` for the tasks of lm-evaluation-harness alone, the same as for all when absent. The profile `paper` sets
    /// it to false: the harness's default of its time, while TRACE's tasks have BOS as in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lm_eval_add_bos_token: Option<bool>,
    /// An installed lm-eval (its folder, or a Python that has it) for shots that it alone publishes: those of `gsm8k_cot`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lm_eval: Option<PathBuf>,
    /// Most tokens of prompt and answer, instead of the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    /// Directory of answers that models gave before, to any run: what is there is not computed again.
    #[serde(skip)]
    pub cache: Option<PathBuf>,
}

impl Default for EvalConfig {
    fn default() -> Self {
        EvalConfig {
            tasks: None,
            old: Vec::new(),
            max_new_tokens: None,
            metric: None,
            precision: Precision::F32,
            batch_tokens: 2048,
            batch_sequences: 32,
            add_bos_token: None,
            lm_eval_add_bos_token: None,
            lm_eval: None,
            max_length: None,
            cache: None,
        }
    }
}

fn is_auto(format: &Format) -> bool {
    *format == Format::Auto
}

pub(crate) fn seed() -> u64 {
    42
}

pub(crate) fn auto() -> String {
    "auto".to_owned()
}

fn yes() -> bool {
    true
}

impl TrainRun {
    /// The mixture of the round.
    pub fn mixture(&self) -> Mixture {
        Mixture { joint: self.mixture.joint.clone(), replay: self.replay }
    }
}

impl RoundConfig {
    /// A round that trains on a task and is scored by it.
    pub(crate) fn of_task(task: &str) -> RoundConfig {
        RoundConfig {
            name: task.to_owned(),
            data: Vec::new(),
            scored: None,
            format: Format::Auto,
            columns: Columns::default(),
            joint: None,
            train: toml::Table::new(),
        }
    }
}

/// One path or a list of them.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a path or a list of paths")]
    enum Paths {
        One(PathBuf),
        Several(Vec<PathBuf>),
    }
    Ok(match Paths::deserialize(deserializer)? {
        Paths::One(path) => vec![path],
        Paths::Several(paths) => paths,
    })
}
