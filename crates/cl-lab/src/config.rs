use std::path::PathBuf;

use cl_checkpoint::HubSnapshot;
use cl_data::{Columns, Format, Joint, Mixture, Profile, Replay};
use cl_eval::Metric;
use cl_torch::Quantization;
use cl_train::{Precision, TrainConfig, ValidationConfig};
use serde::{Deserialize, Deserializer, Serialize};

/// Configuration of `cl train`: one round of fine-tuning. Paths are relative to the current directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRun {
    /// Model directory to start from.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Random seed.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Profile: which set of definitions applies.
    #[serde(default, deserialize_with = "Profile::of_training")]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Training data.
    pub data: DataConfig,
    /// Training settings.
    pub train: TrainConfig,
    /// Validation during training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// How several data sets are combined.
    #[serde(default, skip_serializing_if = "MixtureConfig::is_default")]
    pub mixture: MixtureConfig,
    /// Replay of rows from `data.earlier`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

/// Data of a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// A file of examples, a task directory with a train split, or a list of these.
    #[serde(deserialize_with = "one_or_several")]
    pub train: Vec<PathBuf>,
    /// Format of the rows.
    #[serde(default)]
    pub format: Format,
    /// Field names of the rows, if they differ from those of the format.
    #[serde(default, skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Maximum number of rows read from each file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Data of earlier rounds for replay: one file or task directory per round.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<PathBuf>,
}

/// Configuration of `cl sequence`: several rounds of fine-tuning. Paths are relative to the current directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceConfig {
    /// Model directory to start from.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Directory of tasks in TRACE's layout, each with a train and a test split.
    pub data: PathBuf,
    /// Tasks in training order, one per round: a short form of `[[rounds]]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Random seed.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Which definitions apply.
    #[serde(default, deserialize_with = "Profile::of_training")]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Keep the models of all rounds; otherwise only the last. Adapters are always kept.
    #[serde(default = "yes")]
    pub keep_models: bool,
    /// Limits on the data.
    #[serde(default)]
    pub limit: Limits,
    /// Training settings.
    pub train: TrainConfig,
    /// Validation during training in every round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// Composition of several data sets of a round.
    #[serde(default, skip_serializing_if = "MixtureConfig::is_default")]
    pub mixture: MixtureConfig,
    /// Replay of earlier rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
    /// Evaluation after each round.
    #[serde(default)]
    pub eval: EvalConfig,
    /// Rounds with their own data, tasks and training settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundConfig>,
}

/// One round of a sequence: an entry of `[[rounds]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundConfig {
    /// Name of the round; its directory is `rounds/<number>-<name>`.
    pub name: String,
    /// Training data: task directories in `data`, or paths of task directories or files. Defaults to the round's name.
    #[serde(default, deserialize_with = "one_or_several", skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<PathBuf>,
    /// Tasks that the round trains on; defaults to the round's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scored: Option<Vec<String>>,
    /// Format of the rows.
    #[serde(default, skip_serializing_if = "is_auto")]
    pub format: Format,
    /// Names of the rows' fields, if they differ from the format's.
    #[serde(default, skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Composition of several data sets; defaults to the sequence's `[mixture]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joint: Option<Joint>,
    /// Validation during training; defaults to the sequence's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// Overrides of the sequence's `[train]`.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub train: toml::Table,
}

/// `[mixture]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// Composition of several data sets of a round.
    #[serde(default)]
    pub joint: Joint,
}

impl MixtureConfig {
    pub(crate) fn is_default(&self) -> bool {
        *self == MixtureConfig::default()
    }
}

/// Limits on the data; the first rows of each file are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Maximum number of training rows per task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<usize>,
    /// Maximum number of test documents per task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<usize>,
    /// Maximum number of documents of each task of old knowledge, if different; for a group such as `mmlu`, the total,
    /// divided evenly among its tasks and rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<usize>,
    /// Maximum number of tokens of a generated answer, for tasks that would generate more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_tokens: Option<usize>,
}

/// Evaluation settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Tasks of new knowledge; defaults to those that the rounds train on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tasks: Option<Vec<String>>,
    /// Tasks of old knowledge: known tasks, or `.jsonl` files of multiple-choice questions.
    pub old: Vec<String>,
    /// Maximum number of tokens of a generated answer; defaults to the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// Number of few-shot examples; defaults to the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_fewshot: Option<usize>,
    /// Metric; defaults to the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Dtype of the computation.
    pub precision: Precision,
    /// Format in which the weights of linear layers are kept in memory; dense by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantization>,
    /// Maximum number of tokens per forward pass.
    pub batch_tokens: usize,
    /// Number of sequences generated in parallel.
    pub batch_sequences: usize,
    /// Whether to prepend BOS to every text; defaults to the tokenizer's behaviour.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_bos_token: Option<bool>,
    /// `add_bos_token` for tasks of lm-evaluation-harness only. The profile `paper` sets it to false, the harness's
    /// default at the time; TRACE's tasks have BOS as in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lm_eval_add_bos_token: Option<bool>,
    /// An installed lm-eval (its directory, or a Python interpreter that has it), for the few-shot examples of
    /// `gsm8k_cot`, which only it publishes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lm_eval: Option<PathBuf>,
    /// Maximum number of tokens of prompt and answer; defaults to the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    /// Directory of the response cache, shared by all runs.
    #[serde(skip)]
    pub cache: Option<PathBuf>,
}

impl Default for EvalConfig {
    fn default() -> Self {
        EvalConfig {
            tasks: None,
            old: Vec::new(),
            max_new_tokens: None,
            num_fewshot: None,
            metric: None,
            precision: Precision::F32,
            quantize: None,
            batch_tokens: cl_eval::DEFAULT_BATCH_TOKENS,
            batch_sequences: cl_eval::DEFAULT_BATCH_SEQUENCES,
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
    /// Composition of the round's data.
    pub fn mixture(&self) -> Mixture {
        Mixture { joint: self.mixture.joint.clone(), replay: self.replay }
    }
}

impl RoundConfig {
    /// A round that trains on one task and is evaluated on it.
    pub(crate) fn of_task(task: &str) -> RoundConfig {
        RoundConfig {
            name: task.to_owned(),
            data: Vec::new(),
            scored: None,
            format: Format::Auto,
            columns: Columns::default(),
            joint: None,
            validation: None,
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
