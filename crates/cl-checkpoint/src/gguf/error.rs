use std::path::{Path, PathBuf};

use super::{HeaderItem, HeaderProblem, KeyProblem, TensorProblem};

/// Error in reading or importing a GGUF file. Every message names the file, and the key or tensor if there is one.
///
/// Messages are complete: they include the messages of their causes, and `source` therefore returns `None`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// I/O error.
    #[error("{path}: {}", crate::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        r#source: std::io::Error,
    },
    /// The file is not a GGUF file.
    #[error("{path}: not a GGUF file (it does not start with the bytes `GGUF`)")]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// The version of the format, or the byte order, is not supported.
    #[error("{path}: GGUF version {version} is not supported; little-endian files of version 2 and 3 are")]
    Version {
        /// The file.
        path: PathBuf,
        /// The version as stored.
        version: u32,
    },
    /// The header is damaged.
    #[error(
        "{path}: invalid GGUF header at byte {offset}: {}{problem}",
        item.as_ref().map_or_else(String::new, |item| format!("{item}: "))
    )]
    Header {
        /// The file.
        path: PathBuf,
        /// Offset in the file.
        offset: usize,
        /// The entry that was being read, if any.
        item: Option<HeaderItem>,
        /// What is wrong.
        problem: HeaderProblem,
    },
    /// A required metadata key is missing.
    #[error("{path}: metadata key `{key}` is missing")]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value is invalid or not supported.
    #[error("{path}: metadata key `{key}`: {problem}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with the value.
        problem: KeyProblem,
    },
    /// A tensor's entry is invalid.
    #[error("{path}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: TensorProblem,
    },
    /// A required tensor is missing.
    #[error("{path}: tensor `{tensor}` is missing")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The architecture has no such tensor.
    #[error(
        "{path}: tensor `{tensor}` is not part of a {architecture} model and would be lost, so nothing is imported"
    )]
    UnusedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// `general.architecture`.
        architecture: String,
    },
    /// A weight is not finite, in the file or after rounding.
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
        /// The target dtype.
        dtype: &'static str,
        /// What can be done about it, if anything.
        hint: &'static str,
    },
    /// The architecture is not supported.
    #[error("{path}: architecture `{architecture}` is not supported; supported: {}", supported.join(", "))]
    Architecture {
        /// The file.
        path: PathBuf,
        /// `general.architecture`.
        architecture: String,
        /// The supported architectures.
        supported: Vec<&'static str>,
    },
    /// The tokenizer model or pre-tokenizer is not supported. A wrong guess would silently split text differently.
    #[error("{path}: `{key}` is `{name}`, which is not supported; supported: {}", supported.join(", "))]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: &'static str,
        /// Its value.
        name: String,
        /// The supported values.
        supported: Vec<&'static str>,
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
