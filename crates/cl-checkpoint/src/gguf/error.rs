use std::path::{Path, PathBuf};

/// Why a GGUF file cannot be read or imported. Every message names the file, and the key or tensor where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system's answer.
    #[error("{path}: {}", crate::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// The file does not start as GGUF files do.
    #[error("{path}: not a GGUF file (it does not start with the bytes `GGUF`)")]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// A version of the format, or a byte order, that is not read.
    #[error("{path}: GGUF version {version} is not supported; little-endian files of version 2 and 3 are")]
    Version {
        /// The file.
        path: PathBuf,
        /// As stored.
        version: u32,
    },
    /// The header's structure is broken.
    #[error("{path}: broken GGUF header at byte {offset}: {problem}")]
    Header {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A metadata value that is needed is not there.
    #[error("{path}: metadata key `{key}` is missing")]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value that cannot be used.
    #[error("{path}: metadata key `{key}`: {problem}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with the value.
        problem: String,
    },
    /// A tensor's entry does not make sense.
    #[error("{path}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{path}: tensor `{tensor}` is missing")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor that the architecture has no place for.
    #[error(
        "{path}: tensor `{tensor}` has no place in a {architecture} model; it would be lost, so nothing is imported"
    )]
    UnusedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// `general.architecture`.
        architecture: String,
    },
    /// A weight that is no finite number, in the file or after rounding.
    #[error("{path}: tensor `{tensor}`: element {index} is {value} and cannot be stored as {dtype}{hint}")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index, row-major, as in the file.
        index: usize,
        /// The value in f32.
        value: f32,
        /// What it was to be rounded to.
        dtype: &'static str,
        /// How to go on, where there is a way.
        hint: &'static str,
    },
    /// An architecture that is not imported.
    #[error("{path}: architecture `{architecture}` is not supported; supported are {supported}")]
    Architecture {
        /// The file.
        path: PathBuf,
        /// `general.architecture`.
        architecture: String,
        /// Those that are.
        supported: String,
    },
    /// A tokenizer model or pre-tokenizer that is not known: guessing would split text wrongly without anybody noticing.
    #[error("{path}: `{key}` is `{name}`, which is not supported; supported are {supported}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: &'static str,
        /// Its value.
        name: String,
        /// Those that are.
        supported: String,
    },
    /// The output directory cannot be written.
    #[error(transparent)]
    Output(#[from] crate::Error),
}

impl Error {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }
}
