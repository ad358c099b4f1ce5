use std::path::PathBuf;

use cl_checkpoint::Dtype;

use crate::methods::Undefined;
use crate::problem::Problem;
use crate::recipe::error::ConfigError;

/// The error type of this crate. Every message says what is wrong and where, and how to proceed if possible.
///
/// Messages are complete: they include the messages of their causes, and `source` therefore returns `None`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error in a model or an output directory.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// A value of an input is NaN or an infinity.
    #[error(
        "{model}: tensor `{tensor}`: element {index} is {value}; non-finite values cannot be merged. \
         --allow-non-finite allows them in tensors that are copied unchanged"
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
    /// A merged value cannot be represented in the output's dtype.
    #[error(
        "tensor `{tensor}`: merged element {index} is {value}, which cannot be represented in {dtype:?}; choose a \
         dtype with a larger range, or smaller weights"
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
    /// The number of values in memory differs from the number of elements of the tensor.
    #[error("{}tensor `{tensor}`: {found} values, but its shape has {expected}", prefix(model.as_deref()))]
    ValueCount {
        /// The model, if there are several.
        model: Option<String>,
        /// The tensor.
        tensor: String,
        /// Number of values.
        found: usize,
        /// Number of elements of the shape.
        expected: usize,
    },
    /// The dtype of an input is not floating point.
    #[error("{model}: tensor `{tensor}`: {dtype:?} cannot be merged; expected f64, f32, f16, bf16 or an 8-bit type")]
    NotFloat {
        /// The model.
        model: String,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// A method is not defined for these values.
    #[error("tensor `{tensor}`: {method}: {kind}")]
    Undefined {
        /// The tensor.
        tensor: String,
        /// The method.
        method: &'static str,
        /// The reason, and how to proceed.
        kind: Undefined,
    },
    /// A configuration file is invalid.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        r#source: ConfigError,
    },
    /// All problems of a merge, found before the first byte was written.
    #[error("{} problem{} found; nothing was written:{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, list(.0))]
    Problems(Vec<Problem>),
    /// All problems of a stage, found only after earlier stages were finished.
    #[error(
        "stage {stage}: {} problem{} found; the result was not written, and the finished stages are kept in {} for the next run:{}",
        problems.len(), if problems.len() == 1 { "" } else { "s" }, kept.display(), list(problems)
    )]
    StageProblems {
        /// Name of the stage; `result` for a last stage without a name.
        stage: String,
        /// What is wrong.
        problems: Vec<Problem>,
        /// Directory of the finished stages.
        kept: PathBuf,
    },
    /// The merge was interrupted.
    #[error("stopped; nothing was written")]
    Interrupted,
    /// An error of the operating system.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error.
        r#source: std::io::Error,
    },
}

fn prefix(model: Option<&str>) -> String {
    model.map_or_else(String::new, |model| format!("{model}: "))
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Error {
        Error::Problems(vec![problem])
    }
}
