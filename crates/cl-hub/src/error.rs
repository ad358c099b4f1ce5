use std::path::PathBuf;

use crate::RepoKind;
use crate::problem::{AnswerProblem, DownloadProblem, RepoProblem, UploadProblem};

/// Error in reading from or writing to the Hub.
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
    /// The Hub has no such repository or revision, or hides it from requests without a token.
    #[error("{endpoint} has no {kind} {repo} at revision {revision}{hint}")]
    NotFound {
        /// Model or data set.
        kind: RepoKind,
        /// The repository.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// Address of the Hub.
        endpoint: String,
        /// Other possible reasons.
        hint: &'static str,
    },
    /// Access to the repository is denied.
    #[error("access to {repo} denied (HTTP {status}): {hint}")]
    Access {
        /// The repository.
        repo: String,
        /// 401 or 403.
        status: u16,
        /// How to get access.
        hint: &'static str,
    },
    /// The Hub does not respond.
    #[error("{url}: {message}; if the files are cached, set HF_HUB_OFFLINE=1 to use them without a request")]
    Network {
        /// The requested URL.
        url: String,
        /// The HTTP client's message.
        message: String,
    },
    /// The response is not the expected one.
    #[error("{url}: {problem}")]
    Answer {
        /// The requested URL.
        url: String,
        /// What was received.
        problem: AnswerProblem,
    },
    /// A download is incomplete. Its data are kept in the cache, and the next call resumes it.
    #[error("{url}: {problem}")]
    Download {
        /// The file.
        url: String,
        /// What is missing or wrong.
        problem: DownloadProblem,
    },
    /// A download was stopped by a signal. Its data are kept in the cache, and the next call resumes it.
    #[error("stopped while {url} was downloaded; the same command resumes it")]
    Interrupted {
        /// The file.
        url: String,
    },
    /// Something is not cached, and the Hub is set to offline.
    #[error(
        "{repo} at revision {revision}: {missing} is not in {cache}, and HF_HUB_OFFLINE is set; \
         unset it, or download the {kind} into this cache first"
    )]
    Offline {
        /// Model or data set.
        kind: RepoKind,
        /// The repository.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// What is not cached.
        missing: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The repository does not contain what is needed.
    #[error("{repo} at revision {revision}: {problem}")]
    Unusable {
        /// The repository.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// What it contains instead.
        problem: RepoProblem,
    },
    /// An upload failed. Files that were already stored are kept, and are not sent again.
    #[error("{repo}: {problem}")]
    Upload {
        /// The repository.
        repo: String,
        /// What is wrong.
        problem: UploadProblem,
    },
    /// The front matter of an existing card cannot be read.
    #[error("{path}: the lines between `---` are not YAML ({message}); correct or remove them")]
    Card {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        message: String,
    },
    /// The output of a publication exists.
    #[error("{path}: already exists; move it, or choose another output")]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The cache cannot be written.
    #[error("{path}: cannot be written ({source}); set HF_HUB_CACHE to a writable folder")]
    Cache {
        /// The cache directory.
        path: PathBuf,
        /// I/O error.
        r#source: std::io::Error,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// I/O error.
        r#source: std::io::Error,
    },
    /// A file of a model cannot be read or written.
    #[error(transparent)]
    File(#[from] cl_checkpoint::Error),
}

impl HubError {
    /// Converts an I/O error of a file, for `map_err`.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> HubError + '_ {
        move |source| HubError::Io { path: path.to_owned(), source }
    }
}
