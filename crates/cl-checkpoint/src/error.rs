use std::path::{Path, PathBuf};

/// Why a directory or file cannot be read or written. Every message names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system's answer.
    #[error("{path}: {}", crate::files::explain(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// A file that has to be there is not.
    #[error("{path}: not found; {hint}")]
    NotFound {
        /// What was looked for.
        path: PathBuf,
        /// What a directory of this kind holds.
        hint: &'static str,
    },
    /// Something else where a file has to be.
    #[error("{path}: is {what}; a regular file is expected")]
    NotAFile {
        /// What was to be read.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A file larger than any of its kind has reason to be.
    #[error("{path}: has more than {limit} bytes, the most that is read of a file of this kind")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that it may have.
        limit: u64,
    },
    /// A text file that is none.
    #[error("{path}: byte {offset} is not valid UTF-8; the file is damaged or not a text file")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that does not fit, counted from 0.
        offset: usize,
    },
    /// The safetensors header does not describe the file.
    #[error("{path}: not a valid safetensors file: {message}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// One tensor's entry in the header does not make sense.
    #[error("{path}: tensor `{tensor}`: {message}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        message: String,
    },
    /// A tensor that is not there.
    #[error("{path}: tensor `{tensor}` not found")]
    TensorNotFound {
        /// Where it was looked for.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// JSON that does not parse or has another form.
    #[error("{path}: {message}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        message: String,
    },
    /// The index of a sharded model contradicts its shards.
    #[error("{path}: {message}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What contradicts what.
        message: String,
    },
    /// A value that is not a number where numbers were asked for.
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
    /// The output exists and was not to be replaced.
    #[error("{path}: exists already; add --overwrite to replace it, or choose another output")]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// An output that may not be replaced, since it holds something that this program did not write.
    #[error("{path}: {what}, so it is not overwritten; move it away, or choose another output")]
    NotReplaceable {
        /// The output.
        path: PathBuf,
        /// What is in the way.
        what: String,
    },
    /// An output in the place of what is read for it.
    #[error("{path}: {relation} {other}; choose another output")]
    Overlap {
        /// The output.
        path: PathBuf,
        /// How the two lie: `is`, `contains`, `lies inside`.
        relation: &'static str,
        /// The input with its role, or the working directory.
        other: String,
    },
    /// An input that was replaced or overwritten while it was read.
    #[error("{path}: has changed while it was read, so nothing was written; run the command again when it is at rest")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Another process writes the same output.
    #[error("{path}: is being written by another process; wait for it, or choose another output")]
    Busy {
        /// The output.
        path: PathBuf,
    },
    /// The plan of an output does not make sense, or was not followed.
    #[error("{path}: {message}")]
    Plan {
        /// The output.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// An adapter directory that does not make sense.
    #[error("{path}: {message}")]
    Adapter {
        /// The file.
        path: PathBuf,
        /// What is wrong and how to go on.
        message: String,
    },
}

/// What to say of a directory that was taken for a model or an adapter and is a mixture of adapters.
pub(crate) fn mixture_hint(dir: &Path) -> Option<&'static str> {
    dir.join("mixture_config.json").exists().then_some(
        "this is a mixture of adapters, which routers weigh for each token: `cl eval` and `cl generate` take it as --adapter; \
         it cannot be merged, folded or trained on",
    )
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Error {
        let path = path.to_owned();
        move |e| Error::Json { path, message: format!("not valid JSON: {e}") }
    }
}
