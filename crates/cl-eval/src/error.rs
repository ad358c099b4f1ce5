use std::path::{Path, PathBuf};

/// Why a task cannot be loaded, run or tabulated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that is no task and no directory of one.
    #[error(
        "task `{name}`: no such directory in {dir}, and no known task has it there; known tasks: {known}; or name any \
         directory with a test.json or test.jsonl of {{\"prompt\", \"answer\"}}, or a .jsonl file of questions"
    )]
    UnknownTask {
        /// What was asked for.
        name: String,
        /// Where directories were looked for.
        dir: PathBuf,
        /// Names of the registry.
        known: String,
    },
    /// A file without which a task cannot be asked as it is defined.
    #[error("task `{name}`: {path} is missing; {needed}{}", or_fetched(dataset.as_deref()))]
    MissingFile {
        /// The task.
        name: String,
        /// Where it was expected first.
        path: PathBuf,
        /// What it is needed for.
        needed: String,
        /// The data set of the hub that has the same rows.
        dataset: Option<String>,
    },
    /// Shots that lm-eval publishes as part of its task, and nobody else may copy.
    #[error(
        "task `{name}`: its shots come with lm-eval: `pip install lm-eval`, then cl eval --lm-eval python3 (eval.lm_eval in a \
         sequence), or the path of the package; or write them to {path}"
    )]
    LmEvalShots {
        /// The task.
        name: String,
        /// A file that would do.
        path: PathBuf,
    },
    /// There is no lm-eval, or it has no such task.
    #[error("{path}: {message}")]
    LmEval {
        /// What was given for lm-eval.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Rows that no file has, and that cannot be had from the hub either.
    #[error("task `{name}`: {path} is missing, and the hub's data set {dataset} cannot be read: {source}")]
    Fetch {
        /// The task.
        name: String,
        /// Where a file was expected first.
        path: PathBuf,
        /// Repository, configuration and split.
        dataset: String,
        /// Why not.
        source: Box<cl_data::Error>,
    },
    /// A line of a JSONL file is no JSON or lacks something.
    #[error("{path}: line {line}: {}; expected {expected}", shortened(&source.to_string()))]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What a line looks like.
        expected: &'static str,
        /// What is wrong with this one.
        source: serde_json::Error,
    },
    /// A question's right choice is not among its choices.
    #[error("{path}: line {line}: gold = {gold}, but choices are counted from 0 and there are {choices}")]
    Gold {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The index.
        gold: usize,
        /// How many choices there are.
        choices: usize,
    },
    /// A question given in code has no right choice.
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
        /// How many choices there are.
        choices: usize,
    },
    /// A task's description is no TOML, or has a key that there is not.
    #[error("{path}: line {line}: {message}")]
    TaskToml {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A key of a task's description cannot be what it is.
    #[error("{path}: `{key}`: {message}")]
    TaskKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A row does not fit into a task's templates.
    #[error("{path}: row {row} (from 0): task `{name}`: `{key}`: {message}")]
    TaskRow {
        /// The task.
        name: String,
        /// The file of the row.
        path: PathBuf,
        /// Index of the row.
        row: usize,
        /// The key of the task's description.
        key: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A file of values that templates use is no JSON.
    #[error("{path}: {source}")]
    Values {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// There are too few rows to draw shots from.
    #[error("task `{name}`: {shots} shots need {wanted} rows to draw from, and there are {available}")]
    Shots {
        /// The task.
        name: String,
        /// Shots of a document.
        shots: usize,
        /// Rows drawn for it.
        wanted: usize,
        /// Rows there are.
        available: usize,
    },
    /// The chat template failed.
    #[error("task `{name}`: the chat template failed: {message}")]
    Chat {
        /// The task.
        name: String,
        /// Its error.
        message: String,
    },
    /// A group where one task was asked for.
    #[error("`{name}` is a group of {members} tasks; load it as a group, or one of them, such as `{first}`")]
    IsGroup {
        /// The group.
        name: String,
        /// How many.
        members: usize,
        /// The first.
        first: String,
    },
    /// Scores of a group's task are missing.
    #[error("group `{group}`: no scores of task `{task}`")]
    NoMember {
        /// The group.
        group: String,
        /// The task.
        task: String,
    },
    /// A task without documents.
    #[error("task `{name}`: no documents to ask about")]
    NoDocuments {
        /// The task.
        name: String,
    },
    /// The operating system's answer.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// A file that cannot be read or written as a whole: missing, no regular file, too large, no text.
    #[error(transparent)]
    File(#[from] cl_checkpoint::Error),
    /// A file where a directory is needed.
    #[error("{path}: is a file, and {file} needs a directory there; move it away, or write elsewhere")]
    NoDirectory {
        /// What is in the way.
        path: PathBuf,
        /// What was to be written.
        file: PathBuf,
    },
    /// Another process, or another task of this one, adds answers to the file.
    #[error(
        "{path}: another process is scoring into this file; wait for it, or write elsewhere (cl eval --out); several \
         adapters of one command get a directory each"
    )]
    Busy {
        /// The predictions file.
        path: PathBuf,
    },
    /// A file in the place of the predictions is something else.
    #[error(
        "{path}: line {line} is no prediction ({}); the file is left as it is: move it away or write elsewhere",
        shortened(&source.to_string())
    )]
    NotPredictions {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with the line.
        source: serde_json::Error,
    },
    /// Saved predictions are another model's.
    #[error("{path}: holds answers of model {found}, not {expected}; remove the file or write elsewhere")]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// Fingerprint in the file.
        found: String,
        /// Fingerprint of the model that is asked now.
        expected: String,
    },
    /// Saved predictions do not answer every document.
    #[error(
        "{path}: document {document} of {documents} of task `{task}` has no answer; evaluate with the model to go on"
    )]
    Unanswered {
        /// The file.
        path: PathBuf,
        /// The task.
        task: String,
        /// The first such document, from 0.
        document: usize,
        /// Documents of the task.
        documents: usize,
    },
    /// The model raised an error.
    #[error("task `{task}`: the model failed: {message}")]
    Model {
        /// The task.
        task: String,
        /// The model's error and what it was caused by.
        message: String,
    },
    /// The model gave another number of answers than it was asked for.
    #[error("task `{task}`: the model gave {got} answers to {asked} requests")]
    Answers {
        /// The task.
        task: String,
        /// Requests.
        asked: usize,
        /// Answers.
        got: usize,
    },
    /// A directory without predictions.
    #[error("{path}: no file of predictions (.jsonl) in this directory")]
    NoPredictions {
        /// The directory.
        path: PathBuf,
    },
    /// Two runs hold the same document against different references.
    #[error("task `{task}`: document {document} has another target in {b} than in {a}; such runs cannot be compared")]
    OtherTarget {
        /// The task.
        task: String,
        /// Its index in the first run.
        document: usize,
        /// The first run.
        a: PathBuf,
        /// The second run.
        b: PathBuf,
    },
    /// Two runs score a task differently.
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
        /// The second run's.
        metric_b: &'static str,
    },
    /// Two runs without a document that both answer.
    #[error(
        "{a} and {b} answer no document of a task both; documents are the same when name of the task and request are"
    )]
    NothingInCommon {
        /// The first run.
        a: PathBuf,
        /// The second run.
        b: PathBuf,
    },
    /// Settings of a bootstrap that mean nothing.
    #[error("{resamples} resamples at level {level}: at least one, and a level between 0 and 1, are needed")]
    Resampling {
        /// Resamples.
        resamples: usize,
        /// Level.
        level: f64,
    },
    /// Predictions whose targets do not have what a metric needs.
    #[error("{path}: task `{task}` cannot be scored by {metric}: {needed}")]
    Unscorable {
        /// The file.
        path: PathBuf,
        /// The task.
        task: String,
        /// Main score of the metric.
        metric: &'static str,
        /// What is missing.
        needed: &'static str,
    },
    /// A row of scores of another length than the matrix has columns.
    #[error("row `{row}` has {got} scores for {expected} columns")]
    Row {
        /// Name of the row.
        row: String,
        /// Columns of the matrix.
        expected: usize,
        /// Scores given.
        got: usize,
    },
    /// Examples of the task.
    #[error(transparent)]
    Data(#[from] cl_data::Error),
}

impl Error {
    /// TOML's own message shows the line that is wrong, which may have a megabyte.
    pub(crate) fn toml(path: &Path, text: &str, error: &toml::de::Error) -> Error {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = 1 + before.matches('\n').count();
        Error::TaskToml { path: path.to_owned(), line, message: shortened(error.message()) }
    }
}

/// The beginning and the end of a message that quotes what it is about.
pub(crate) fn shortened(message: &str) -> String {
    const MOST: usize = 200; // characters of either
    let message = message.trim();
    let count = message.chars().count();
    if count <= 2 * MOST {
        return message.to_owned();
    }
    let part = |from: usize, n: usize| message.chars().skip(from).take(n).collect::<String>();
    format!("{} … {}", part(0, MOST), part(count - MOST, MOST))
}

fn or_fetched(dataset: Option<&str>) -> String {
    dataset.map_or_else(String::new, |repo| format!("; or let it be fetched from the hub data set {repo} (--hub)"))
}
