//! Texts that are no merge file.

use cl_checkpoint::files::{of_yaml, shorten};

/// Why a text is no merge file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It is not TOML, or not a merge in TOML; says the line and column.
    #[error("{}", shorten(&.0.to_string()))]
    Toml(Box<toml::de::Error>), // no source, whose text would be printed again, in the parser's words
    /// It is not YAML, or not a merge in mergekit's YAML; says the line and column.
    #[error("{}", of_yaml(&.0.to_string()))]
    Yaml(Box<serde_saphyr::Error>),
    /// It is not TOML, and its extension does not say that it should be.
    #[error(
        "a file with the extension .yml or .yaml is read as mergekit's YAML, any other as TOML, which this is not: {0}"
    )]
    Extension(Box<ConfigError>),
    /// It holds nothing.
    #[error("the file is empty")]
    Empty,
    /// It asks for what is not supported, or contradicts itself.
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

/// What in mergekit's YAML cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergekitProblem {
    /// A key that has no counterpart.
    #[error("{what} is not supported; remove it")]
    NotSupported {
        /// The key.
        what: &'static str,
    },
    /// Both `tokenizer_source` and `tokenizer`.
    #[error("set either `tokenizer_source` or `tokenizer`")]
    TokenizerTwice,
    /// A token whose settings cannot be read.
    #[error("tokenizer.tokens: `{token}`: {source}")]
    Token {
        /// The token.
        token: String,
        /// The parser's error.
        source: serde_json::Error,
    },
}
