use std::path::{Path, PathBuf};

use cl_checkpoint::files::{in_plain_words, of_json_line, with_causes};
use cl_data::DatasetRef;

use crate::problem::{HarnessProblem, KeyProblem, LmEvalProblem, Need, TemplateProblem, shortened};
use crate::request::BoxError;

/// Error in loading, running or tabulating tasks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The evaluation was stopped.
    #[error("stopped; completed responses are kept, and the same command resumes the evaluation")]
    Interrupted,
    /// The name is neither a known task nor a directory.
    #[error(
        "task `{name}`: not found in {dir}; known tasks: {}. A directory needs a test split \
         of {{\"prompt\", \"answer\"}}: test.json, .jsonl, .csv, .tsv, .txt (each also as .gz) or .parquet", known.join(", ")
    )]
    UnknownTask {
        /// The requested name.
        name: String,
        /// The directory that was searched.
        dir: PathBuf,
        /// Names of the known tasks.
        known: Vec<&'static str>,
    },
    /// A task file of lm-evaluation-harness is invalid or not supported.
    #[error("{path}: {}{problem}", if key.is_empty() { String::new() } else { format!("`{key}`: ") })]
    HarnessTask {
        /// The file.
        path: PathBuf,
        /// The key; empty if the file is not valid YAML.
        key: String,
        /// What is wrong.
        problem: HarnessProblem,
    },
    /// A known task has no directory.
    #[error(
        "task `{name}`: no directory `{name}` in {dir}, in its subdirectory `trace`, or next to either; it contains the \
         test split: test.json, .jsonl, .csv, .tsv, .txt (each also as .gz) or .parquet"
    )]
    NoTaskDirectory {
        /// Name of the task.
        name: String,
        /// The directory that was searched.
        dir: PathBuf,
    },
    /// A table has no column of this name.
    #[error("no column `{name}`; the columns are {}", columns.join(", "))]
    NoColumn {
        /// The name.
        name: String,
        /// Names of the columns.
        columns: Vec<String>,
    },
    /// A file that the task needs is missing.
    #[error("task `{name}`: {path} is missing; {needed}{}", or_fetched(dataset.as_deref()))]
    MissingFile {
        /// The task.
        name: String,
        /// The first path that was tried.
        path: PathBuf,
        /// What the file is needed for.
        needed: Need,
        /// The Hub data set with the same rows.
        dataset: Option<String>,
    },
    /// The few-shot examples are part of lm-eval and are not included here.
    #[error(
        "task `{name}`: its few-shot examples are part of lm-eval: `pip install lm-eval`, then cl eval --lm-eval python3 (eval.lm_eval in a \
         sequence), or the path of the package; or write them to {path}"
    )]
    LmEvalShots {
        /// The task.
        name: String,
        /// A file that would be used instead, if it existed.
        path: PathBuf,
    },
    /// lm-eval was not found, or does not have the task.
    #[error("{path}: {problem}")]
    LmEval {
        /// The path given for lm-eval, or that of the task's file within it.
        path: PathBuf,
        /// What is wrong.
        problem: LmEvalProblem,
    },
    /// There is no local file, and the data set cannot be fetched from the Hub.
    #[error("task `{name}`: {path} is missing, and {} cannot be read from the hub: {source}", named(dataset))]
    Fetch {
        /// The task.
        name: String,
        /// The first path that was tried.
        path: PathBuf,
        /// The Hub data set with the same rows.
        dataset: Box<DatasetRef>,
        /// The reason.
        r#source: Box<cl_data::Error>,
    },
    /// A line of a JSONL file is not valid.
    #[error("{path}: line {line}: {}; expected {expected}", shortened(&of_json_line(&error.to_string())))]
    Line {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The expected format.
        expected: &'static str,
        /// The parser's error.
        error: serde_json::Error, // not a source: its text would be printed again
    },
    /// The index of a question's correct choice is out of range.
    #[error("{path}: line {line}: gold = {gold}, but choices are counted from 0 and there are {choices}")]
    Gold {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The index.
        gold: usize,
        /// Number of choices.
        choices: usize,
    },
    /// A question has fewer than two choices.
    #[error("{path}: line {line}: `choices` has length {choices}; at least 2 are required")]
    FewChoices {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// Number of choices.
        choices: usize,
    },
    /// A question given in code has fewer than two choices.
    #[error("task `{task}`: question {question}: `choices` has length {choices}; at least 2 are required")]
    QuestionFewChoices {
        /// The task.
        task: String,
        /// Index of the question.
        question: usize,
        /// Number of choices.
        choices: usize,
    },
    /// The index of the correct choice is out of range, for a question given in code.
    #[error(
        "task `{task}`: question {question}: gold = {gold}, but choices are counted from 0 and there are {choices}"
    )]
    QuestionGold {
        /// The task.
        task: String,
        /// Index of the question.
        question: usize,
        /// The index.
        gold: usize,
        /// Number of choices.
        choices: usize,
    },
    /// A task description is not valid TOML, or has an unknown key.
    #[error("{path}: line {line}: {message}")]
    TaskToml {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The parser's message, shortened.
        message: String,
    },
    /// The value of a key in a task description is invalid.
    #[error("{path}: `{key}`: {problem}")]
    TaskKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: KeyProblem,
    },
    /// A template cannot be rendered for a row.
    #[error("{path}: row {row} (from 0): task `{name}`: `{key}`: {problem}")]
    TaskRow {
        /// The task.
        name: String,
        /// The file of the row.
        path: PathBuf,
        /// Index of the row.
        row: usize,
        /// The key of the description.
        key: &'static str,
        /// What is wrong.
        problem: Box<TemplateProblem>,
    },
    /// A row is a conversation, but a prompt and an answer are required.
    #[error(
        "{path}: row {row} (from 0): is a conversation, which is not supported for evaluation; use rows of `prompt` and \
         `answer`, or describe the task in a .toml file"
    )]
    Conversation {
        /// The file of the row.
        path: PathBuf,
        /// Index of the row.
        row: usize,
    },
    /// A file of template values is not valid JSON.
    #[error("{path}: {source}")]
    Values {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        r#source: serde_json::Error,
    },
    /// There are too few rows to draw few-shot examples from.
    #[error("task `{name}`: {shots} few-shot examples need {wanted} rows to draw from, but there are {available}")]
    Shots {
        /// The task.
        name: String,
        /// Number of few-shot examples per document.
        shots: usize,
        /// Number of rows needed.
        wanted: usize,
        /// Number of rows available.
        available: usize,
    },
    /// The chat template failed.
    #[error("task `{name}`: the chat template failed: {source}")]
    Chat {
        /// The task.
        name: String,
        /// The template's error.
        r#source: BoxError,
    },
    /// The name is that of a group, but a single task is required.
    #[error("`{name}` is a group of {members} tasks; load the group, or one of its tasks, such as `{first}`")]
    IsGroup {
        /// The group.
        name: String,
        /// Number of tasks.
        members: usize,
        /// The first task.
        first: String,
    },
    /// The scores of a group member are missing.
    #[error("group `{group}`: no scores of task `{task}`")]
    NoMember {
        /// The group.
        group: String,
        /// The task.
        task: String,
    },
    /// The task has no documents.
    #[error("task `{name}`: no documents")]
    NoDocuments {
        /// The task.
        name: String,
    },
    /// I/O error.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        r#source: std::io::Error,
    },
    /// A file cannot be read or written: it is missing, not a regular file, too large, or not text.
    #[error(transparent)]
    File(#[from] cl_checkpoint::Error),
    /// A file exists where a directory is needed.
    #[error("{path}: is a file, but must be a directory to write {file}; move it, or choose another output path")]
    NoDirectory {
        /// The file in place of the directory.
        path: PathBuf,
        /// The file to write.
        file: PathBuf,
    },
    /// Another process, or another task in this process, is writing the predictions file.
    #[error(
        "{path}: another process is writing this file; wait for it, or choose another output directory (cl eval --out); \
         adapters evaluated by one command each have their own"
    )]
    Busy {
        /// The predictions file.
        path: PathBuf,
    },
    /// The file is not a predictions file.
    #[error(
        "{path}: line {line} is not a prediction ({}); the file is unchanged: move it, or choose another output path",
        shortened(&source.to_string())
    )]
    NotPredictions {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The saved predictions are from a different model.
    #[error(
        "{path}: contains answers of model {found}, expected {expected}; remove the file, or choose another output path"
    )]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// Fingerprint in the file.
        found: String,
        /// Fingerprint of the current model.
        expected: String,
    },
    /// A document has no saved prediction.
    #[error(
        "{path}: document {document} of {documents} of task `{task}` has no answer; run the evaluation with the model first"
    )]
    Unanswered {
        /// The file.
        path: PathBuf,
        /// The task.
        task: String,
        /// 0-based index of the first such document.
        document: usize,
        /// Number of documents.
        documents: usize,
    },
    /// The model returned an error.
    #[error("task `{task}`: the model failed: {}", with_causes(source.as_ref()))]
    Model {
        /// The task.
        task: String,
        /// The model's error.
        r#source: BoxError,
    },
    /// The model returned a different number of answers than there were requests.
    #[error("task `{task}`: the model returned {got} answers to {asked} requests")]
    Answers {
        /// The task.
        task: String,
        /// Number of requests.
        asked: usize,
        /// Number of answers.
        got: usize,
    },
    /// The directory has no predictions files.
    #[error(
        "{path}: no predictions files (.jsonl) in this directory; those of a sequence are in rounds/<number>-<name>/scores"
    )]
    NoPredictions {
        /// The directory.
        path: PathBuf,
    },
    /// Two runs have different targets for a document.
    #[error("task `{task}`: document {document} has different targets in {a} and {b}; the runs cannot be compared")]
    OtherTarget {
        /// The task.
        task: String,
        /// Index of the document in the first run.
        document: usize,
        /// The first run.
        a: PathBuf,
        /// The second run.
        b: PathBuf,
    },
    /// Two runs score a task by different metrics.
    #[error("task `{task}`: scored by {metric_a} in {a} and by {metric_b} in {b}")]
    OtherMetric {
        /// The task.
        task: String,
        /// The first run.
        a: PathBuf,
        /// The second run.
        b: PathBuf,
        /// The first run's main score.
        metric_a: &'static str,
        /// The second run's main score.
        metric_b: &'static str,
    },
    /// Two runs have no document in common.
    #[error("{a} and {b} have no document in common; documents are matched by task name and request")]
    NothingInCommon {
        /// The first run.
        a: PathBuf,
        /// The second run.
        b: PathBuf,
    },
    /// The bootstrap settings are invalid.
    #[error("{resamples} resamples at level {level}: at least one resample and a level between 0 and 1 are required")]
    Resampling {
        /// Number of resamples.
        resamples: usize,
        /// Confidence level.
        level: f64,
    },
    /// The targets do not fit the metric.
    #[error("{path}: task `{task}` cannot be scored by {metric}: {needed}")]
    Unscorable {
        /// The file.
        path: PathBuf,
        /// The task.
        task: String,
        /// Main score of the metric.
        metric: &'static str,
        /// What the targets are missing.
        needed: &'static str,
    },
    /// The number of scores in a row differs from the number of columns.
    #[error("row `{row}` has {got} scores for {expected} columns")]
    Row {
        /// Name of the row.
        row: String,
        /// Number of columns.
        expected: usize,
        /// Number of scores.
        got: usize,
    },
    /// The task's data cannot be read.
    #[error(transparent)]
    Data(#[from] cl_data::Error),
}

impl Error {
    /// Converts a TOML error. Its message omits TOML's excerpt of the line, which may be a megabyte long.
    pub(crate) fn toml(path: &Path, text: &str, error: &toml::de::Error) -> Error {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = 1 + before.matches('\n').count();
        Error::TaskToml { path: path.to_owned(), line, message: shortened(&in_plain_words(error.message())) }
    }
}

/// Formats a data set with its configuration and split.
fn named(dataset: &DatasetRef) -> String {
    let DatasetRef { repo, config, split, .. } = dataset;
    let config = config.as_ref().map_or_else(String::new, |config| format!("configuration {config}, "));
    format!("{repo} ({config}split {split})")
}

fn or_fetched(dataset: Option<&str>) -> String {
    dataset.map_or_else(String::new, |repo| format!("; add --hub to download it from {repo}"))
}
