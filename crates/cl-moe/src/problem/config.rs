use cl_checkpoint::files::{of_yaml, shorten};

/// Why a file is not the configuration of a mixture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// It is not TOML, a key is missing or unknown, or a value is invalid.
    #[error("line {line}: {}", shorten(error.message()))]
    Toml {
        /// 1-based line number.
        line: usize,
        /// The parser's error.
        error: Box<toml::de::Error>, // not a `source`, because its excerpt of the text would be printed too
    },
    /// It is not YAML, a key is missing or unknown, or a value is invalid.
    #[error("{}", of_yaml(&.0.to_string()))]
    Yaml(Box<serde_saphyr::Error>), // not a `source`, for the same reason
    /// It is a mergekit-moe file with settings that are not supported.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Mergekit(Vec<MergekitProblem>),
}

/// A setting in mergekit-moe's YAML that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergekitProblem {
    /// A key or a value is not supported.
    #[error("{what} is not supported; remove it")]
    NotSupported {
        /// The key or value.
        what: &'static str,
    },
    /// A way of initializing routers is not supported.
    #[error("gate_mode `{mode}` is not supported; use random, hidden or cheap_embed")]
    GateMode {
        /// Its name.
        mode: String,
    },
}
