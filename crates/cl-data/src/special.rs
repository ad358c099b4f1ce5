//! Special tokens by role, from the JSON files of a model directory.

use std::path::Path;

use cl_checkpoint::files::{MAX_TOKENIZER, read_file};
use serde_json::Value;

use crate::Error;

/// Files that define special tokens, in order of precedence.
pub(crate) const FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// Reads one of [`FILES`] as JSON; `None` if the directory has no such file.
pub(crate) fn read(file: &Path) -> Result<Option<Value>, Error> {
    if !file.exists() {
        return Ok(None);
    }
    let text = read_file(file, MAX_TOKENIZER)?;
    let invalid = |source| Error::Json { path: file.to_owned(), source };
    serde_json::from_slice(&text).map(Some).map_err(invalid)
}

/// Returns the text of a special token, which is given as a string or as an object with the key `content`.
pub(crate) fn token(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}
