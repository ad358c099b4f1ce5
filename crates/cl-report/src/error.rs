use std::path::PathBuf;

/// Errors of reading results and writing reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing failed.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// Not what was expected of the file.
    #[error("{path}: not a study's results, nor what `cl sequence` or `cl eval` writes")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The results have no columns.
    #[error("the results have no columns; a report needs at least one scored task")]
    NoColumns,
    /// A row does not fit the others.
    #[error("stage `{stage}` {problem}")]
    Row {
        /// The stage.
        stage: String,
        /// What is wrong with it.
        problem: String,
    },
}
