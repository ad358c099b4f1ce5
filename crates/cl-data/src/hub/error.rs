use std::path::PathBuf;

/// Errors of reading data sets from the hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The name of a repository, revision or file is invalid.
    #[error("`{name}` is not {expected}")]
    Name {
        /// The name.
        name: String,
        /// What is expected.
        expected: &'static str,
    },
    /// The hub has no such repository or revision, or hides it without a token.
    #[error("{endpoint} has no data set {repo} at revision {revision}{hint}")]
    NotFound {
        /// The data set.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// The hub.
        endpoint: String,
        /// Other possible reasons.
        hint: &'static str,
    },
    /// Access to the data set is denied.
    #[error("access to {repo} denied (HTTP {status}): {hint}")]
    Access {
        /// The data set.
        repo: String,
        /// 401 or 403.
        status: u16,
        /// How to get access.
        hint: &'static str,
    },
    /// The hub does not answer.
    #[error("{url}: {message}; if the files are cached, set HF_HUB_OFFLINE=1 to use them without a request")]
    Network {
        /// The requested URL.
        url: String,
        /// What went wrong.
        message: String,
    },
    /// The answer is not the expected one.
    #[error("{url}: {message}")]
    Answer {
        /// The requested URL.
        url: String,
        /// What was received.
        message: String,
    },
    /// A download is incomplete. It stays in the cache and is resumed by the next call.
    #[error("{url}: {message}")]
    Download {
        /// The file.
        url: String,
        /// What is missing or wrong.
        message: String,
    },
    /// Something is not cached, and no requests may be sent.
    #[error(
        "{repo} at revision {revision}: {missing} is not in {cache}, and HF_HUB_OFFLINE is set; \
         unset it, or download the data set into this cache first"
    )]
    Offline {
        /// The data set.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// What is not cached.
        missing: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The cache cannot be written.
    #[error("{path}: cannot be written ({source}); set HF_HUB_CACHE to a writable folder")]
    Cache {
        /// The folder of the cache.
        path: PathBuf,
        /// I/O error.
        source: std::io::Error,
    },
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
