use std::path::{Path, PathBuf};

use cl_checkpoint::files::shorten;
use cl_data::{Format, Mixture, Profile};
use cl_eval::Metric;
use cl_train::{Precision, TrainConfig};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::LabError;

/// One round of fine-tuning: the file of `cl train`. Paths are taken from the current directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRun {
    /// Model directory to start from.
    pub model: PathBuf,
    /// Key of every random choice.
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
    /// Examples of earlier tasks beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

/// Files of a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// A file of examples, or a task directory with a train split.
    pub train: PathBuf,
    /// How rows become examples.
    #[serde(default)]
    pub format: Format,
    /// Only the first so many rows of each file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Data of earlier rounds, for replay.
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
    /// Tasks in the order they are learned, one a round.
    pub tasks: Vec<String>,
    /// Key of every random choice.
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
    /// Examples of earlier tasks beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
    /// What is scored after every round.
    #[serde(default)]
    pub eval: EvalConfig,
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

/// Examples of earlier tasks, drawn anew each epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    /// Rows of each earlier task, as a share of the current task's rows.
    pub fraction: f64,
}

/// What is scored, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// New knowledge; the tasks of the rounds when absent.
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

fn seed() -> u64 {
    42
}

fn auto() -> String {
    "auto".to_owned()
}

fn yes() -> bool {
    true
}

impl SequenceConfig {
    /// The mixture of every round.
    pub fn mixture(&self) -> Mixture {
        mixture(self.replay)
    }
}

impl TrainRun {
    /// The mixture of the round.
    pub fn mixture(&self) -> Mixture {
        mixture(self.replay)
    }
}

fn mixture(replay: Option<Replay>) -> Mixture {
    replay.map_or(Mixture::None, |r| Mixture::Replay { fraction: r.fraction })
}

/// Reads the configuration of a sequence. `set` holds overrides such as `train.learning_rate=1e-4`, applied in order.
///
/// # Errors
/// [`LabError::Config`] with line and column, [`LabError::Set`].
pub fn read_sequence(path: &Path, text: &str, set: &[String]) -> Result<SequenceConfig, LabError> {
    let config: SequenceConfig = read(path, text, set)?;
    let wrong = |message: String| Err(LabError::Config { path: path.to_owned(), message });
    if config.tasks.is_empty() {
        return wrong("tasks = []: expected at least one".to_owned());
    }
    if let Some((i, task)) = config.tasks.iter().enumerate().find(|(i, t)| config.tasks[..*i].contains(t)) {
        return wrong(format!("tasks: `{task}` comes up again at place {}", i + 1));
    }
    if let Some(task) = config.tasks.iter().find(|t| !is_name(t)) {
        return wrong(format!("tasks: `{task}` is not the name of a directory in `data`"));
    }
    check_common(path, config.replay, &config.train)?;
    at_least_one(path, "limit.train", config.limit.train)?;
    at_least_one(path, "limit.test", config.limit.test)?;
    at_least_one(path, "eval.max_new_tokens", config.eval.max_new_tokens)?;
    for (key, value, most) in [
        ("eval.batch_tokens", config.eval.batch_tokens, 1 << 24),
        ("eval.batch_sequences", config.eval.batch_sequences, 1 << 16),
        ("eval.max_new_tokens", config.eval.max_new_tokens.unwrap_or(1), 1 << 24),
        ("eval.max_length", config.eval.max_length.unwrap_or(1), 1 << 24),
    ] {
        if !(1..=most).contains(&value) {
            return wrong(format!("{key} = {value}: expected 1 to {most}"));
        }
    }
    Ok(config)
}

/// Reads the configuration of one round; see [`read_sequence`] for `set`.
///
/// # Errors
/// [`LabError::Config`] with line and column, [`LabError::Set`].
pub fn read_train(path: &Path, text: &str, set: &[String]) -> Result<TrainRun, LabError> {
    let config: TrainRun = read(path, text, set)?;
    check_common(path, config.replay, &config.train)?;
    at_least_one(path, "data.limit", config.data.limit)?;
    Ok(config)
}

/// Whether this names something directly in a directory; a round's folder is called after its task.
fn is_name(task: &str) -> bool {
    Path::new(task).file_name().is_some_and(|last| last == task)
}

fn at_least_one(path: &Path, key: &str, value: Option<usize>) -> Result<(), LabError> {
    if value != Some(0) {
        return Ok(());
    }
    Err(LabError::Config { path: path.to_owned(), message: format!("{key} = 0: expected at least 1") })
}

fn check_common(path: &Path, replay: Option<Replay>, train: &TrainConfig) -> Result<(), LabError> {
    let wrong = |message: String| LabError::Config { path: path.to_owned(), message };
    if let Some(r) = replay.filter(|r| !(r.fraction > 0.0 && r.fraction <= 100.0)) {
        let expected = "expected a positive number, at most 100, such as 0.1";
        return Err(wrong(format!("replay.fraction = {}: {expected}", r.fraction)));
    }
    train.validate().map_err(|e| wrong(format!("train: {e}")))
}

fn read<T: DeserializeOwned>(path: &Path, text: &str, set: &[String]) -> Result<T, LabError> {
    let wrong = |message: String| LabError::Config { path: path.to_owned(), message };
    let mut table: Table = toml::from_str(text).map_err(|e| wrong(shorten(&e.to_string())))?;
    if set.is_empty() && !is_paper(&table) {
        // Straight from the text, so that errors point at line and column.
        return toml::from_str(text).map_err(|e| wrong(shorten(&e.to_string())));
    }
    for entry in set {
        override_key(&mut table, entry)?;
    }
    if is_paper(&table) {
        paper_defaults(&mut table);
    }
    Value::Table(table).try_into().map_err(|e: toml::de::Error| wrong(shorten(&e.to_string())))
}

fn is_paper(table: &Table) -> bool {
    table.get("profile").and_then(Value::as_str) == Some("paper")
}

/// What the profile `paper` changes where the file says nothing: the loss is a mean per micro-batch, bf16 without master
/// weights everywhere but in the adapters' products, a constant learning rate of 2e-5; o-lora in the definition of its code; a
/// sequence's tasks of lm-eval are scored without BOS.
fn paper_defaults(table: &mut Table) {
    let train = table.entry("train").or_insert_with(|| Value::Table(Table::new()));
    let Some(train) = train.as_table_mut() else { return };
    for (key, value) in [
        ("loss_norm", Value::from("microbatch_mean")),
        ("states", Value::from("pure")),
        ("precision", Value::from("bf16")),
        ("adapter_precision", Value::from("f32")),
        ("learning_rate", Value::from(2e-5)),
    ] {
        train.entry(key).or_insert(value);
    }
    if let Some(olora) = train.get_mut("olora").and_then(Value::as_table_mut) {
        olora.entry("mode").or_insert(Value::from("l1"));
    }
    if table.contains_key("tasks") {
        let eval = table.entry("eval").or_insert_with(|| Value::Table(Table::new()));
        if let Some(eval) = eval.as_table_mut().filter(|e| !e.contains_key("add_bos_token")) {
            eval.entry("lm_eval_add_bos_token").or_insert(Value::from(false));
        }
    }
}

/// `a.b.c=value`: the value is TOML, or text where that does not parse.
fn override_key(table: &mut Table, entry: &str) -> Result<(), LabError> {
    let wrong = |message: &str| LabError::Set { text: entry.to_owned(), message: message.to_owned() };
    let (key, text) = entry.split_once('=').ok_or_else(|| wrong("expected key=value"))?;
    if text.trim().parse::<i128>().is_ok_and(|number| i64::try_from(number).is_err()) {
        return Err(wrong("the number is beyond what TOML holds, -2⁶³ to 2⁶³ - 1"));
    }
    let value = toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::from(text.trim()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|k| !k.is_empty()).ok_or_else(|| wrong("expected a key before ="))?;
    let mut place = table;
    for part in parts {
        place = place
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| wrong("a part of the key is no table"))?;
    }
    place.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "model = 'm'\ndata = 'd'\ntasks = ['a', 'b']\n[train.lora]\nr = 4\n";

    fn sequence(text: &str, set: &[&str]) -> Result<SequenceConfig, LabError> {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        read_sequence(Path::new("c.toml"), text, &set)
    }

    #[test]
    fn overrides_and_profiles() {
        let set = ["train.lora.r=2", "limit.train=9", "replay.fraction=0.1", "model=some/where"];
        let config = sequence(MINIMAL, &set).unwrap();
        assert_eq!(config.train.lora.as_ref().unwrap().r, 2);
        assert_eq!((config.limit.train, config.replay), (Some(9), Some(Replay { fraction: 0.1 })));
        assert_eq!(config.model, Path::new("some/where"));
        let paper = sequence(MINIMAL, &["profile=paper", "train.precision=f32"]).unwrap();
        assert_eq!(paper.train.loss_norm, cl_train::LossNorm::MicrobatchMean);
        assert_eq!((paper.train.precision, paper.train.learning_rate), (Precision::F32, 2e-5));
        assert_eq!((paper.eval.lm_eval_add_bos_token, paper.eval.add_bos_token), (Some(false), None));
        let all = sequence(MINIMAL, &["profile=paper", "eval.add_bos_token=true"]).unwrap();
        assert_eq!((all.eval.lm_eval_add_bos_token, all.eval.add_bos_token), (None, Some(true)));
    }

    #[test]
    fn errors_say_what_and_where() {
        let rows: [(&str, &[&str], &str); 10] = [
            ("model = 'm'\ntask = []", &[], "line 2"),
            (MINIMAL, &["replay.fraction=-1"], "replay.fraction = -1"),
            (MINIMAL, &["tasks=['a', 'a']"], "`a` comes up again"),
            (MINIMAL, &["tasks=['a', '../b']"], "`../b` is not the name"),
            (MINIMAL, &["limit.train=0"], "limit.train = 0: expected at least 1"),
            (MINIMAL, &["eval.max_new_tokens=0"], "eval.max_new_tokens = 0"),
            (MINIMAL, &["train.full={}"], "exactly one of"),
            (MINIMAL, &["train.epochs=0"], "epochs = 0"),
            (MINIMAL, &["=3"], "expected a key"),
            (MINIMAL, &["train.learning_rat=3"], "learning_rat"),
        ];
        for (text, set, part) in rows {
            let message = sequence(text, set).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn the_resolved_configuration_reads_back() {
        let config = sequence(MINIMAL, &["replay.fraction=0.1"]).unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(sequence(&text, &[]).unwrap(), config);
    }
}
