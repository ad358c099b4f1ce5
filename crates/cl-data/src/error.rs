use std::path::PathBuf;

use crate::{DatasetError, HubError};

/// Errors of reading and tokenizing data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// I/O error.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A file cannot be read or written: it is missing, not a regular file, too large, or not text.
    #[error(transparent)]
    File(#[from] cl_checkpoint::Error),
    /// A line of a JSONL file is too long.
    #[error("{path}: line {line} is longer than {limit} bytes; expected JSONL, with one object per line")]
    LongLine {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// There is no file of the split.
    #[error("{dir}: no {split}.json, .jsonl, .csv, .tsv or .txt (each optionally with .gz), and no {split}.parquet")]
    NoSplit {
        /// The task's directory.
        dir: PathBuf,
        /// `train`, `eval` or `test`.
        split: &'static str,
    },
    /// The file is in no supported format, or is not a list of objects.
    #[error("{path}: {message}")]
    Form {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found, and where.
        message: String,
    },
    /// A row lacks a key, or has a value that is not text.
    #[error("{path}: row {row} (from 0): {message}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Index of the row.
        row: usize,
        /// What is wrong.
        message: String,
    },
    /// An example cannot be tokenized.
    #[error("row {row} (from 0): {source}")]
    Example {
        /// Index of the row.
        row: usize,
        /// Why.
        source: Box<Error>,
    },
    /// The file has no examples.
    #[error("{path}: no examples")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The tokenizer's files are invalid.
    #[error("{path}: {message}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The tokenizer failed.
    #[error("cannot tokenize: {message}")]
    Encode {
        /// The tokenizer's message.
        message: String,
    },
    /// The data set cannot be read from the hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The hub's data set has no such split.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A chat template is invalid, or rejected a conversation.
    #[error("{path}: {message}")]
    Chat {
        /// The file with the template.
        path: PathBuf,
        /// The template's own message, or what is wrong with it.
        message: String,
    },
    /// The tokenizer has no EOS token, which training requires.
    #[error("{path}: no eos_token; training requires one to end each answer")]
    NoEos {
        /// The tokenizer's configuration.
        path: PathBuf,
    },
}
