use std::path::PathBuf;

/// Why a data set cannot be had from the hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Not the name of a repository, a revision or a file.
    #[error("`{name}` is not {expected}")]
    Name {
        /// What was given.
        name: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// The hub has no such repository or revision, or shows it to nobody without a token.
    #[error("{endpoint} has no data set {repo} at revision {revision}{hint}")]
    NotFound {
        /// The data set.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// The hub.
        endpoint: String,
        /// What else it can be.
        hint: &'static str,
    },
    /// The hub does not let this user read it.
    #[error("{repo} may not be read (HTTP {status}): {hint}")]
    Access {
        /// The data set.
        repo: String,
        /// 401 or 403.
        status: u16,
        /// How to get access.
        hint: &'static str,
    },
    /// No answer.
    #[error("{url}: {message}; where the files are in the cache already, HF_HUB_OFFLINE=1 uses them without a request")]
    Network {
        /// What was asked for.
        url: String,
        /// What went wrong.
        message: String,
    },
    /// Another answer than expected.
    #[error("{url}: {message}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What came.
        message: String,
    },
    /// A file did not come whole; what came stays in the cache, and the next call goes on from there.
    #[error("{url}: {message}")]
    Download {
        /// The file.
        url: String,
        /// How much came, or what does not fit.
        message: String,
    },
    /// No request may be sent, and the cache lacks something.
    #[error(
        "{repo} at revision {revision}: {missing} is not in {cache}, and no request is sent while HF_HUB_OFFLINE is set; \
         unset it, or download the data set into this cache first"
    )]
    Offline {
        /// The data set.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// What the cache lacks.
        missing: String,
        /// The cache.
        cache: PathBuf,
    },
    /// What is downloaded has no place.
    #[error("{path}: cannot be written ({source}); set HF_HUB_CACHE to a folder that can")]
    Cache {
        /// The folder of the cache.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The repository's files do not have the split.
    #[error("{repo} has no files of {wanted}; it has {found}")]
    NoSplit {
        /// The data set.
        repo: String,
        /// Configuration and split.
        wanted: String,
        /// The configurations and splits there are.
        found: String,
    },
    /// Several configurations have the split, and none was named.
    #[error("{repo} has {split} in several configurations, name one of: {configs}")]
    Config {
        /// The data set.
        repo: String,
        /// The split.
        split: String,
        /// The configurations.
        configs: String,
    },
    /// The files of a split are not all there.
    #[error("{repo}: {split} is not whole: {message}")]
    Shards {
        /// The data set.
        repo: String,
        /// The split.
        split: String,
        /// Which files are missing.
        message: String,
    },
}
