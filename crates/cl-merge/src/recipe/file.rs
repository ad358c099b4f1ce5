//! Reading of merge files.

use std::path::Path;

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use serde::Deserialize;

use super::config::{MergeConfig, MergeFile};
use super::error::ConfigError;
use super::mergekit;
use crate::Error;

impl MergeFile {
    /// Reads a file: mergekit YAML if its extension is .yml or .yaml, in upper or lower case, TOML otherwise.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be read, or [`Error::Config`] if it is not a valid merge file.
    pub fn read(path: &Path) -> Result<MergeFile, Error> {
        let text = read_text(path, MAX_CONFIG)?;
        let is = |known: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(known));
        let file = if is("yml") || is("yaml") {
            MergeFile::from_yaml(&text)
        } else {
            let other = |error| if is("toml") { error } else { ConfigError::Extension(Box::new(error)) };
            MergeFile::from_toml(&text).map_err(other)
        };
        file.map_err(|source| Error::Config { path: path.to_owned(), source })
    }

    /// Parses TOML: one merge, or stages under `[[stage]]`.
    ///
    /// # Errors
    /// Returns an error with its position if this is not a valid merge file.
    pub fn from_toml(text: &str) -> Result<MergeFile, ConfigError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Stages {
            stage: Vec<MergeConfig>,
        }
        let table: toml::Table = toml::from_str(text)?;
        let stages = if table.contains_key("stage") {
            toml::from_str::<Stages>(text)?.stage
        } else {
            vec![toml::from_str(text)?]
        };
        Ok(MergeFile { stages })
    }

    /// Parses mergekit's YAML: one merge, or a document for each stage.
    ///
    /// ```
    /// use cl_merge::{MergeFile, Profile};
    /// let file = MergeFile::from_yaml(
    ///     "merge_method: ties
    /// base_model: base
    /// models:
    ///   - {model: tuned/law, parameters: {density: 0.2}}
    ///   - {model: tuned/code, parameters: {density: 0.2, weight: 0.5}}
    /// ",
    /// )?;
    /// assert_eq!((file.stages[0].models.len(), file.stages[0].profile), (2, Profile::Mergekit));
    /// # Ok::<(), cl_merge::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error with its position if this is not a valid merge file, or the unsupported keys.
    pub fn from_yaml(text: &str) -> Result<MergeFile, ConfigError> {
        mergekit::from_yaml(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_a_table_or_only_its_path() {
        let file = |models: &str| MergeFile::from_toml(&format!("method = 'linear'\nmodels = [{models}]"));
        let (short, long) =
            (file("'a', { model = 'b', weight = 2 }").unwrap(), file("{ model = 'a' }, { model = 'b', weight = 2 }"));
        assert_eq!(short, long.unwrap());
        assert_eq!(MergeFile::from_toml(&toml::to_string(&short.stages[0]).unwrap()).unwrap(), short);
        let message = file("'a', 3").unwrap_err().to_string();
        assert!(message.contains("a table such as { model ="), "{message}");
    }
}
