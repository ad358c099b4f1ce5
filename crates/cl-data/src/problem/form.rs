use cl_checkpoint::files::of_json_line;

use super::ParquetProblem;

/// Why a file is not a list of rows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormProblem {
    /// A line is not valid UTF-8.
    #[error("line {line}: not UTF-8 at byte {offset} (from 0) of the {}", unit(*field))]
    NotUtf8 {
        /// 1-based line number.
        line: u64,
        /// 0-based index of the field, in CSV and TSV.
        field: Option<usize>,
        /// 0-based offset of the first invalid byte in the line or field.
        offset: usize,
    },
    /// A line is not valid JSON.
    #[error(
        "line {line}: not valid JSON: {}; expected a JSON list, or one object per line",
        of_json_line(&error.to_string())
    )]
    JsonLine {
        /// 1-based line number.
        line: usize,
        /// The parser's error.
        error: serde_json::Error, // not a source: its text would be printed again
    },
    /// The file starts as a JSON list but is not valid JSON.
    #[error("not valid JSON: {source}")]
    JsonList {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// A row of a JSON list is too long.
    #[error("a row longer than {limit} bytes")]
    LongRow {
        /// The limit in bytes.
        limit: usize,
    },
    /// A record of CSV or TSV is too long.
    #[error("a record is longer than {limit} bytes; check for an unclosed quotation mark")]
    LongRecord {
        /// The limit in bytes.
        limit: usize,
    },
    /// The first line of CSV or TSV names a field twice.
    #[error("the first line has the field `{name}` twice")]
    FieldTwice {
        /// The field.
        name: String,
    },
    /// A record of CSV or TSV has more or fewer fields than the first line.
    #[error("line {line}: has {found} fields, but the first line has {expected}")]
    Fields {
        /// 1-based line number.
        line: u64,
        /// Number of fields in the first line.
        expected: u64,
        /// Number of fields in the record.
        found: u64,
    },
    /// The file cannot be read as CSV or TSV.
    #[error("{source}")]
    Csv {
        /// The parser's error.
        r#source: csv::Error,
    },
    /// The Parquet file is damaged, or has columns that JSON cannot represent.
    #[error(transparent)]
    Parquet(#[from] ParquetProblem),
}

fn unit(field: Option<usize>) -> String {
    field.map_or_else(|| "line".to_owned(), |field| format!("field {field}"))
}
