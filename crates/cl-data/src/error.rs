use std::path::PathBuf;

use crate::problem::{ChatProblem, ColumnsProblem, FormProblem, RowPlanProblem, RowProblem};
use crate::{DatasetError, HubError};

/// Error in reading or tokenizing data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// I/O error.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        r#source: std::io::Error,
    },
    /// A file cannot be read or written: it is missing, not a regular file, too large, or not text.
    #[error(transparent)]
    File(#[from] cl_checkpoint::Error),
    /// A relative path leads to no file.
    #[error("{path}: not found; relative paths start at the current directory")]
    NotFound {
        /// The file.
        path: PathBuf,
    },
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
    /// There is no file for the split.
    #[error("{dir}: no {split}.json, .jsonl, .csv, .tsv or .txt (each optionally with .gz), and no {split}.parquet")]
    NoSplit {
        /// The task's directory.
        dir: PathBuf,
        /// `train`, `eval` or `test`.
        split: &'static str,
    },
    /// The file has no supported format, or is not a list of objects.
    #[error("{path}: {problem}")]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: FormProblem,
    },
    /// The settings of columns are invalid.
    #[error("{path}: {problem}")]
    Columns {
        /// The file that they were to be applied to.
        path: PathBuf,
        /// What is wrong with them.
        problem: ColumnsProblem,
    },
    /// A row lacks a field, or has a value that is not text.
    #[error("{path}: row {row} (from 0): {problem}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Index of the row.
        row: usize,
        /// What is wrong.
        problem: Box<RowProblem>,
    },
    /// An example cannot be tokenized.
    #[error("row {row} (from 0): {source}")]
    Example {
        /// Index of the row.
        row: usize,
        /// Why.
        r#source: Box<Error>,
    },
    /// The file has no examples.
    #[error("{path}: no examples")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A `rows.json` is damaged, or was written by a version that draws different rows.
    #[error("{path}: {problem}")]
    RowPlan {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: RowPlanProblem,
    },
    /// The tokenizer's configuration is not valid JSON.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The `tokenizer.json` is invalid.
    #[error("{path}: {source}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The error of the crate `tokenizers`.
        r#source: tokenizers::Error,
    },
    /// The tokenizer failed.
    #[error("cannot tokenize: {source}")]
    Encode {
        /// The error of the crate `tokenizers`.
        r#source: tokenizers::Error,
    },
    /// The BOS token is not in the vocabulary.
    #[error("cannot tokenize: bos_token `{token}` is not in the vocabulary")]
    BosNotInVocabulary {
        /// The BOS token.
        token: String,
    },
    /// The data set cannot be read from the Hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The data set on the Hub has no such split.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A chat template is invalid, or rejected a conversation.
    #[error("{path}: {problem}")]
    Chat {
        /// The file with the template.
        path: PathBuf,
        /// What is wrong.
        problem: ChatProblem,
    },
    /// The data has conversations, but the model has no chat template.
    #[error(
        "chat_template: the model has none, but the data has conversations; use a model with a chat template, or rows of \
         prompt and answer"
    )]
    NoChatTemplate,
    /// The tokenizer has no EOS token, which training requires.
    #[error("{path}: no eos_token; training requires one to end each answer")]
    NoEos {
        /// The tokenizer's configuration.
        path: PathBuf,
    },
}
