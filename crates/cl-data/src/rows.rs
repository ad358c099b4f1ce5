use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};

use crate::{Error, parquet_file};

/// A row of a data file: its fields in the order of the file.
pub type Row = Map<String, Value>;

/// The rows of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct RowFile {
    /// In file order.
    pub rows: Vec<Row>,
    /// blake3 of the file, hexadecimal.
    pub hash: String,
}

/// Reads a `.json` file (a list of objects) or a `.jsonl` file (an object a line), either gzipped or not, or a
/// `.parquet` file, whose rows come as the JSON of the same data set would give them: structs as objects, lists as lists,
/// class labels as the integers they are stored as. The content decides, not the name; blank lines and a byte-order mark
/// are skipped.
///
/// # Errors
/// [`Error::Io`], [`Error::Form`] (a Parquet column that has no form in JSON, bytes or a date, is named in it),
/// [`Error::Row`] with the row's index.
///
/// # Example
/// ```
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("test.jsonl");
/// std::fs::write(&path, "{\"question\": \"1+1?\", \"answer\": \"2\"}\n")?;
/// let file = cl_data::read_rows(&path)?;
/// assert_eq!(file.rows[0]["answer"], "2");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_rows(path: &Path) -> Result<RowFile, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut f| f.read_to_end(&mut bytes)).map_err(io)?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    if bytes.starts_with(parquet_file::MAGIC) {
        return Ok(RowFile { rows: parquet_file::rows(path, bytes)?, hash });
    }
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).map_err(io)?;
        bytes = plain;
    }
    let form = |message| Error::Form { path: path.to_owned(), message };
    let text = String::from_utf8(bytes).map_err(|e| form(format!("not UTF-8: {}", e.utf8_error())))?;
    Ok(RowFile { rows: rows(path, text.strip_prefix('\u{feff}').unwrap_or(&text))?, hash })
}

fn rows(path: &Path, text: &str) -> Result<Vec<Row>, Error> {
    let form = |message: String| Error::Form { path: path.to_owned(), message };
    let row = |row, value| match value {
        Value::Object(object) => Ok(object),
        other => {
            let message = format!("expected an object like {{\"prompt\": …, \"answer\": …}}, got {}", kind(&other));
            Err(Error::Row { path: path.to_owned(), row, message })
        }
    };
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(text).map_err(|e| form(format!("not valid JSON: {e}")))?;
        return list.into_iter().enumerate().map(|(i, v)| row(i, v)).collect();
    }
    let mut objects = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let value = serde_json::from_str(line).map_err(|e| {
            form(format!("line {}: not valid JSON: {e}; expected a JSON list, or an object on every line", number + 1))
        })?;
        objects.push(row(objects.len(), value)?);
    }
    Ok(objects)
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
