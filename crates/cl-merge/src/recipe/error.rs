//! Errors in reading merge files.

use cl_checkpoint::files::{of_yaml, shorten};

/// An error in reading a merge file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not valid TOML, or not a valid merge file; with line and column.
    #[error("{}", shorten(&.0.to_string()))]
    Toml(Box<toml::de::Error>),
    /// The text is not valid YAML, or not valid in mergekit's format; with line and column.
    #[error("{}", of_yaml(&.0.to_string()))]
    Yaml(Box<serde_saphyr::Error>),
    /// The text is not valid TOML, and the file's extension does not say that it should be.
    #[error("not valid TOML (only files with the extension .yml or .yaml are read as mergekit's YAML): {0}")]
    Extension(Box<ConfigError>),
    /// The file is empty.
    #[error("the file is empty")]
    Empty,
    /// The file uses unsupported features, or contradicts itself.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Mergekit(Vec<MergekitProblem>),
}

impl From<toml::de::Error> for ConfigError {
    fn from(error: toml::de::Error) -> ConfigError {
        ConfigError::Toml(Box::new(error))
    }
}

impl From<serde_saphyr::Error> for ConfigError {
    fn from(error: serde_saphyr::Error) -> ConfigError {
        ConfigError::Yaml(Box::new(error))
    }
}

/// An unsupported or invalid setting in mergekit's YAML.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergekitProblem {
    /// A key has no counterpart.
    #[error("{what} is not supported; remove it")]
    NotSupported {
        /// The key.
        what: &'static str,
    },
    /// Both `tokenizer_source` and `tokenizer` are set.
    #[error("set either `tokenizer_source` or `tokenizer`")]
    TokenizerTwice,
    /// The settings of a token are invalid.
    #[error("tokenizer.tokens: `{token}`: {source}")]
    Token {
        /// The token.
        token: String,
        /// The parser's error.
        r#source: serde_json::Error,
    },
}
