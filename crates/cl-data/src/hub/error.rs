use std::fmt::{self, Display, Formatter};

/// Why a data set on the Hub does not have a split.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// No file of the repository belongs to the split.
    #[error("{repo} has no files of {wanted}; it has {}", list(found))]
    NoSplit {
        /// The data set.
        repo: String,
        /// The split, as `configuration/split` if a configuration was specified.
        wanted: String,
        /// The existing splits, in the same form.
        found: Vec<String>,
    },
    /// Several configurations have the split, and none was specified.
    #[error("{repo} has {split} in several configurations; specify one of: {}", configs.join(", "))]
    Config {
        /// The data set.
        repo: String,
        /// The split.
        split: String,
        /// The configurations.
        configs: Vec<String>,
    },
    /// Files of the split are missing.
    #[error("{repo}: {split} is incomplete: {gap}{}", if *offline { " in the cache, and HF_HUB_OFFLINE is set" } else { "" })]
    Shards {
        /// The data set.
        repo: String,
        /// The split.
        split: String,
        /// Which files are missing.
        gap: Box<ShardGap>,
        /// Whether only the cache was searched, because the Hub is set to offline.
        offline: bool,
    },
}

/// Which files of a split are missing, by the numbers in their names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardGap {
    /// Number of files.
    pub found: usize,
    /// Number of files according to their names.
    pub expected: usize,
    /// The first missing number, from 0; `None` if a number occurs twice.
    pub missing: Option<usize>,
    /// One of the files.
    pub file: String,
}

impl Display for ShardGap {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let ShardGap { found, expected, missing, file } = self;
        match missing {
            Some(n) => write!(f, "{found} files of {expected}; number {n} (from 0) is missing next to {file}"),
            None => write!(f, "{found} files, but their names say {expected}, such as {file}"),
        }
    }
}

/// Lists the existing splits, shortened to a readable length.
pub(super) fn list(found: &[String]) -> String {
    match found.len() {
        0 => "no .parquet, .jsonl or .json files".to_owned(),
        n if n > 40 => format!("{} and {} more", found[..40].join(", "), n - 40),
        _ => found.join(", "),
    }
}
