/// Why a data set of the hub does not have a split.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The repository's files do not have the split.
    #[error("{repo} has no files of {wanted}; it has {found}")]
    NoSplit {
        /// The data set.
        repo: String,
        /// Configuration and split.
        wanted: String,
        /// Existing configurations and splits.
        found: String,
    },
    /// Several configurations have the split, and none was specified.
    #[error("{repo} has {split} in several configurations; specify one of: {configs}")]
    Config {
        /// The data set.
        repo: String,
        /// The split.
        split: String,
        /// The configurations.
        configs: String,
    },
    /// Files of the split are missing.
    #[error("{repo}: {split} is incomplete: {message}")]
    Shards {
        /// The data set.
        repo: String,
        /// The split.
        split: String,
        /// Which files are missing.
        message: String,
    },
}
