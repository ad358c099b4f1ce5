use std::path::PathBuf;

/// Why a task cannot be loaded, run or tabulated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that is no task and no directory of one.
    #[error("task `{name}`: not known, and {dir} has no directory of that name; known tasks: {known}")]
    UnknownTask {
        /// What was asked for.
        name: String,
        /// Where directories were looked for.
        dir: PathBuf,
        /// Names of the registry.
        known: String,
    },
    /// A file of questions has another form.
    #[error("{path}: line {line}: {message}")]
    Question {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A task without documents.
    #[error("task `{name}`: no documents")]
    NoDocuments {
        /// The task.
        name: String,
    },
    /// The operating system's answer.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// Saved predictions belong to another task or another limit.
    #[error("{path}: {message}; remove the file to ask the model again")]
    Predictions {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// The model gave no answer.
    #[error("task `{task}`: {message}")]
    Model {
        /// The task.
        task: String,
        /// The model's error.
        message: String,
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
