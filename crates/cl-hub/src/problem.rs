//! What is wrong with answers, downloads, repositories and uploads, as facts in fields; a [`HubError`](crate::HubError)
//! adds where.

use std::path::PathBuf;

use serde_json::Value;

/// Why an answer of the hub is not the expected one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerProblem {
    /// It is an error status.
    #[error("HTTP {status}")]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// There is no such file.
    #[error("no such file (HTTP 404)")]
    NoFile,
    /// It is redirected too often.
    #[error("too many redirects")]
    Redirects,
    /// It is redirected, in an upload.
    #[error("redirected, which uploads do not follow")]
    Redirected,
    /// It is not the listing of a repository.
    #[error("not a listing of a repository: {source}")]
    Listing {
        /// The parser's error.
        source: serde_json::Error,
    },
    /// It is not the JSON of an upload.
    #[error("not the expected answer: {source}")]
    Upload {
        /// The parser's error.
        source: serde_json::Error,
    },
    /// A file has no etag.
    #[error("no etag")]
    NoEtag,
    /// A file's etag cannot be its name in the cache.
    #[error("an etag that is not a valid file name")]
    Etag,
}

/// Why a download is incomplete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadProblem {
    /// The connection ended again and again.
    #[error("interrupted after {received}{} bytes: {cut}", size.map_or_else(String::new, |size| format!(" of {size}")))]
    Interrupted {
        /// Bytes received.
        received: u64,
        /// Size of the file, if the hub says it.
        size: Option<u64>,
        /// How the last attempt ended.
        cut: Cut,
    },
    /// It has another size than the hub says.
    #[error("received {received} bytes, expected {size}")]
    Size {
        /// Bytes received.
        received: u64,
        /// Size of the file.
        size: u64,
    },
    /// It has another hash than the hub says.
    #[error("its {kind} is {found}, expected {expected}")]
    Hash {
        /// `SHA-256` or `SHA-1`.
        kind: &'static str,
        /// The hash received, hexadecimal.
        found: String,
        /// The hash by the hub.
        expected: String,
    },
}

/// How an attempt to download a file ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cut {
    /// The server does not have the rest of the file.
    #[error("the server does not have this range")]
    NoRange,
    /// The server sent another part of the file.
    #[error("unexpected range: {range}")]
    Range {
        /// The header `Content-Range`.
        range: String,
    },
    /// The server failed.
    #[error("HTTP {status}")]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// The server sent less than it announced.
    #[error("the connection ended")]
    Ended,
    /// The request failed.
    #[error("{message}")]
    Request {
        /// The HTTP client's message.
        message: String,
    },
}

/// Why a repository does not hold what is needed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepoProblem {
    /// An adapter in place of a model.
    #[error("it is an adapter, not a model; name it after its base, as base+adapter or by --adapter")]
    Adapter,
    /// A model in place of an adapter.
    #[error("it is a model, not an adapter (there is no adapter_config.json)")]
    Model,
    /// An adapter that is not stored as safetensors.
    #[error("it has only adapter_model.bin; convert it to safetensors first (PEFT's save_pretrained does)")]
    BinAdapter,
    /// No adapter.
    #[error("it has no adapter_config.json with adapter_model.safetensors")]
    NoAdapter,
    /// A model that is not stored as safetensors.
    #[error("it has only .bin weights; convert them to safetensors first (Transformers' save_pretrained does)")]
    BinModel,
    /// A model in the format GGUF.
    #[error("it has only GGUF files; download one, and convert it with `cl import-gguf`")]
    Gguf,
    /// No model.
    #[error("it has no config.json with model.safetensors")]
    NoModel,
    /// An index of shards that is not one.
    #[error("{index} is not an index: {source}")]
    Index {
        /// Name of the index.
        index: &'static str,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// An index of shards that are not files of the repository.
    #[error("{index} names `{shard}`, which is not a file beside it")]
    Shard {
        /// Name of the index.
        index: &'static str,
        /// The shard.
        shard: String,
    },
}

/// Why an upload fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UploadProblem {
    /// No requests may be sent.
    #[error("HF_HUB_OFFLINE is set; unset it to upload")]
    Offline,
    /// There is no token.
    #[error("uploading needs a token with write access; set HF_TOKEN, or save it in HF_HOME/token")]
    NoToken,
    /// A file is not what its manifest lists.
    #[error("{path}: is not what manifest.json lists; restore or make it again")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The upload was stopped by a signal.
    #[error("stopped; the same command resumes it")]
    Stopped,
    /// The hub does not take a file.
    #[error("{file}: {error}")]
    Refused {
        /// The file.
        file: String,
        /// The hub's error.
        error: Value,
    },
    /// The hub announces parts and does not say where to.
    #[error("the hub gave no address for part {part} of {count}")]
    NoAddress {
        /// Number of the part, from 1.
        part: u64,
        /// Number of parts.
        count: u64,
    },
    /// The storage does not confirm a part.
    #[error("the storage gave no etag for part {part}")]
    NoEtag {
        /// Number of the part, from 1.
        part: u64,
    },
    /// The storage does not take a file.
    #[error("{file}: the storage answers HTTP {status}")]
    Storage {
        /// The file.
        file: String,
        /// The HTTP status.
        status: u16,
    },
    /// The storage failed again and again.
    #[error("{file}: {cut}; what is stored stays, and the same command resumes")]
    Failed {
        /// The file.
        file: String,
        /// How the last attempt ended.
        cut: Cut,
    },
    /// A file is too large for Git.
    #[error("{file}: {size} bytes are too many for a file outside LFS")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size in bytes.
        size: u64,
    },
}
