use std::path::PathBuf;

/// Error in reading results or writing reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing failed.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// The JSON does not have the expected structure.
    #[error("{path}: not a study's results, nor what `cl sequence` or `cl eval` writes")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Runs cannot be read.
    #[error(transparent)]
    Eval(#[from] cl_eval::Error),
    /// A study was given together with other runs.
    #[error("{path} is a study; a study cannot be combined with other runs in one report")]
    Several {
        /// The study.
        path: PathBuf,
    },
    /// Two sequences train on a task in different rounds.
    #[error(
        "{path} trains on `{task}` in {}, but the first sequence in {}; backward transfer is not comparable between \
         different orders, so write a separate report for each order",
        round(.other), round(.first)
    )]
    Rounds {
        /// The second sequence.
        path: PathBuf,
        /// The task.
        task: String,
        /// The round in the first sequence.
        first: Option<usize>,
        /// The round in this one.
        other: Option<usize>,
    },
    /// The output path contains something other than a report.
    #[error("{path} exists and is not a report written by this program; choose another directory")]
    NotAReport {
        /// The directory.
        path: PathBuf,
    },
    /// A figure could not be rasterized.
    #[error("{figure}: cannot be rasterized: {problem}")]
    Raster {
        /// The figure.
        figure: String,
        /// What is wrong.
        problem: String,
    },
    /// The page template could not be rendered.
    #[error("the page could not be made")]
    Page(#[from] minijinja::Error),
    /// The results have no columns.
    #[error("the results have no columns; a report needs at least one scored task")]
    NoColumns,
    /// A row is inconsistent with the others.
    #[error("stage `{stage}` {problem}")]
    Row {
        /// The stage.
        stage: String,
        /// What is wrong.
        problem: String,
    },
}

fn round(round: &Option<usize>) -> String {
    round.map_or("no round".to_owned(), |r| format!("round {r}"))
}
