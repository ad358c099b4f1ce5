use std::path::PathBuf;

use cl_checkpoint::Dtype;

use crate::methods::Undefined;
use crate::problem::Problem;
use crate::recipe::error::ConfigError;

/// Why a merge cannot be done. Every message names what is wrong and where, and how to go on where there is a way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model or an output directory.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// A value that is not a number in an input.
    #[error(
        "{model}: tensor `{tensor}`: element {index} is {value}; a merge of it would be meaningless. `--allow-non-finite` copies such tensors where they are not merged"
    )]
    NotFinite {
        /// The model.
        model: String,
        /// The tensor.
        tensor: String,
        /// Flat index, row-major.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// A merged value that the output's dtype cannot hold.
    #[error(
        "tensor `{tensor}`: merged element {index} is {value}, which {dtype:?} cannot hold; choose a wider dtype or smaller weights"
    )]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Flat index, row-major.
        index: usize,
        /// The value.
        value: f32,
        /// Element type of the output.
        dtype: Dtype,
    },
    /// A method that has no answer for these values.
    #[error("tensor `{tensor}`: {method}: {kind}")]
    Undefined {
        /// The tensor.
        tensor: String,
        /// The method.
        method: &'static str,
        /// Why, and how to go on.
        kind: Undefined,
    },
    /// A configuration file that does not say what can be done.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// Everything that stands in the way of a merge, found before the first byte was written.
    #[error("{} problem{} found; nothing was written:{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, list(.0))]
    Problems(Vec<Problem>),
    /// The same of a stage, found only when earlier ones were done.
    #[error(
        "stage {stage}: {} problem{} found; the result was not written, and the finished stages are kept in {} for the next run:{}",
        problems.len(), if problems.len() == 1 { "" } else { "s" }, kept.display(), list(problems)
    )]
    StageProblems {
        /// The stage's name; `result` for a last one without a name.
        stage: String,
        /// What is wrong.
        problems: Vec<Problem>,
        /// The directory of the finished stages.
        kept: PathBuf,
    },
    /// The work was asked to stop.
    #[error("stopped; nothing was written")]
    Interrupted,
    /// The operating system's answer.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Error {
        Error::Problems(vec![problem])
    }
}
