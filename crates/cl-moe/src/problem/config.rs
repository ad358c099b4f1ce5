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
        error: Box<toml::de::Error>, // no source, whose picture of the text would be printed as well
    },
    /// It is not YAML, a key is missing or unknown, or a value is invalid.
    #[error("{}", of_yaml(&.0.to_string()))]
    Yaml(Box<serde_saphyr::Error>), // no source, for the same reason
    /// It is of mergekit-moe and asks for what is not supported.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Mergekit(Vec<MergekitProblem>),
}

/// What in mergekit-moe's YAML is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergekitProblem {
    /// A key or a value.
    #[error("{what} is not supported; remove it")]
    NotSupported {
        /// What.
        what: &'static str,
    },
    /// A way of initializing routers.
    #[error("gate_mode `{mode}` is not supported; use random, hidden or cheap_embed")]
    GateMode {
        /// Its name.
        mode: String,
    },
}
