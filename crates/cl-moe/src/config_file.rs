//! Configuration files: TOML, or the YAML of `mergekit-moe`.

use std::path::Path;

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use serde::de::DeserializeOwned;

use crate::problem::ConfigProblem;
use crate::{Error, MixConfig, mergekit};

impl MixConfig {
    /// Reads a TOML file, or mergekit-moe's YAML if the extension is `.yml` or `.yaml`.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with the line if the file does not parse, and [`Error::Checkpoint`] if it cannot be
    /// read.
    pub fn read(path: &Path) -> Result<MixConfig, Error> {
        let text = read_text(path, MAX_CONFIG)?;
        let wrong = |problem| Error::Config { path: path.to_owned(), problem };
        let yaml = path.extension().is_some_and(|e| e == "yml" || e == "yaml");
        if yaml { mergekit::from_yaml(&text).map_err(wrong) } else { from_toml(&text).map_err(wrong) }
    }
}

pub(crate) fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, ConfigProblem> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        ConfigProblem::Toml { line, error: Box::new(e) }
    })
}
