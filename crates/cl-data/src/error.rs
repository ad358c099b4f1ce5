use std::path::PathBuf;

use crate::HubError;

/// Why examples or a tokenizer cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system's answer.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// A file that cannot be read or written as a whole: missing, no regular file, too large, no text.
    #[error(transparent)]
    File(#[from] cl_checkpoint::Error),
    /// A line of a JSONL file that no example has.
    #[error("{path}: line {line} has more than {limit} bytes; is it a JSONL file, an object on every line?")]
    LongLine {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The most that is read.
        limit: usize,
    },
    /// No file of a split.
    #[error("{dir}: no {split}.json, .jsonl, .csv, .tsv or .txt, each also with .gz, and no {split}.parquet")]
    NoSplit {
        /// The task's directory.
        dir: PathBuf,
        /// `train`, `eval` or `test`.
        split: &'static str,
    },
    /// The file is no JSON and no Parquet, or not a list of objects.
    #[error("{path}: {message}")]
    Form {
        /// The file.
        path: PathBuf,
        /// What was expected and found, and where.
        message: String,
    },
    /// One row lacks a key, or holds something else than text.
    #[error("{path}: row {row} (from 0): {message}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Index of the row.
        row: usize,
        /// What is wrong.
        message: String,
    },
    /// An example that cannot be turned into tokens.
    #[error("row {row} (from 0): {source}")]
    Example {
        /// Index of the row.
        row: usize,
        /// Why.
        source: Box<Error>,
    },
    /// The file holds no examples.
    #[error("{path}: no examples in it")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The tokenizer's files do not make a tokenizer.
    #[error("{path}: {message}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The tokenizer refused a text.
    #[error("cannot tokenize: {message}")]
    Encode {
        /// The tokenizer's message.
        message: String,
    },
    /// The hub does not give the data set.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A chat template is none, or refused a conversation.
    #[error("{path}: {message}")]
    Chat {
        /// The file that holds the template.
        path: PathBuf,
        /// The template's own message, or what is wrong with it.
        message: String,
    },
    /// Targets need an end token.
    #[error("{path}: no eos_token; training needs one to end each answer")]
    NoEos {
        /// The tokenizer's configuration.
        path: PathBuf,
    },
}
