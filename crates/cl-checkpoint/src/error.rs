use std::path::{Path, PathBuf};

use crate::problem::{AdapterProblem, HeaderProblem, IndexProblem, Obstacle, PlanProblem, TensorProblem};

/// Error in reading or writing checkpoints. Every message names the file, and the tensor if there is one.
///
/// Messages are complete: they include the messages of their causes, and `source` therefore returns `None`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// I/O error.
    #[error("{path}: {}", crate::files::explain(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The I/O error.
        r#source: std::io::Error,
    },
    /// A required file is missing.
    #[error("{path}: not found; {hint}")]
    NotFound {
        /// The missing file.
        path: PathBuf,
        /// What is expected there.
        hint: &'static str,
    },
    /// The path is not a regular file.
    #[error("{path}: is {what}; expected a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// Its kind, such as a directory or a FIFO.
        what: &'static str,
    },
    /// The file exceeds the size limit of its kind.
    #[error("{path}: has more than {limit} bytes, the limit for files of this kind")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file is not valid UTF-8.
    #[error("{path}: byte {offset} is not valid UTF-8; the file is damaged or not a text file")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// 0-based offset of the first invalid byte.
        offset: usize,
    },
    /// The safetensors header does not match the file.
    #[error("{path}: not a valid safetensors file: {problem}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: HeaderProblem,
    },
    /// A tensor's entry in the header is invalid, or the tensor cannot be read as requested.
    #[error("{path}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: Box<TensorProblem>,
    },
    /// There is no such tensor.
    #[error("{path}: tensor `{tensor}` not found")]
    TensorNotFound {
        /// The directory or file that was searched.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// The JSON is invalid, or has an unexpected structure.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The JSON is not an object.
    #[error("{path}: expected a JSON object")]
    NotAnObject {
        /// The file.
        path: PathBuf,
    },
    /// The index of a sharded model is invalid, or contradicts its shards.
    #[error("{path}: {problem}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong.
        problem: Box<IndexProblem>,
    },
    /// A tensor has a NaN or infinite value.
    #[error("{path}: tensor `{tensor}`: element {index} is {value}")]
    NotFinite {
        /// Directory or file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index, row-major.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// The output exists, and overwriting was not requested.
    #[error("{path}: already exists; add --overwrite to replace it, or choose another output")]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output contains something that this program did not write, so it is not replaced.
    #[error("{path}: {obstacle}, so it is not overwritten; move it, or choose another output")]
    NotReplaceable {
        /// The output.
        path: PathBuf,
        /// What it is or contains.
        obstacle: Obstacle,
    },
    /// The output overlaps with an input or with the working directory.
    #[error("{path}: {relation} {role} ({other}); choose another output")]
    Overlap {
        /// The output.
        path: PathBuf,
        /// `is`, `contains` or `lies inside`.
        relation: &'static str,
        /// What it overlaps with: the role of an input, or `the working directory`.
        role: Box<str>,
        /// Its path.
        other: Box<Path>,
    },
    /// An input changed while it was being read.
    #[error("{path}: changed while it was being read, so nothing was written; run the command again")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Another process is writing the output.
    #[error("{path}: is being written by another process; wait for it, or choose another output")]
    Busy {
        /// The output.
        path: PathBuf,
    },
    /// The plan of an output is invalid, or was not followed.
    #[error("{path}: {problem}")]
    Plan {
        /// The output.
        path: PathBuf,
        /// What is wrong.
        problem: Box<PlanProblem>,
    },
    /// The adapter directory is invalid.
    #[error("{path}: {problem}")]
    Adapter {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: Box<AdapterProblem>,
    },
}

/// Returns a hint if a mixture of adapters was given where a model or an adapter is expected.
pub(crate) fn mixture_hint(dir: &Path) -> Option<&'static str> {
    dir.join("mixture_config.json").exists().then_some(
        "this is a mixture of adapters with routers, which can only be given once, as --adapter of `cl eval`, `cl generate` or \
         `cl chat`, or to `cl moe train-router`; it cannot be merged or folded",
    )
}

/// Returns `hint` if the directory is that of a run, which contains the expected directory as `inner`, or another hint
/// if it is that of a sequence.
pub(crate) fn run_hint(dir: &Path, inner: &str, hint: &'static str) -> Option<&'static str> {
    if dir.join(inner).exists() {
        return Some(hint);
    }
    let sequence = dir.join("rounds").is_dir() && dir.join("matrix.json").exists();
    sequence
        .then_some("this is a sequence; specify the directory `adapter` or `model` of a round, rounds/<number>-<name>")
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Json { path, source }
    }
}
