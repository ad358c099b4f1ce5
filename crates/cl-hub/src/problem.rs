//! What is wrong with responses, downloads, repositories and uploads, as structured values; a
//! [`HubError`](crate::HubError) adds where.

use std::path::PathBuf;

use serde_json::Value;

/// Why a response of the Hub is not the expected one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerProblem {
    /// It is an error status.
    #[error("HTTP {status}")]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// Too many requests were sent.
    #[error(
        "HTTP 429, rate limited{}; wait{}",
        seconds.map_or_else(String::new, |seconds| format!(" for {seconds} s")),
        if *has_token { " and try again" } else { ", or set HF_TOKEN" }
    )]
    RateLimited {
        /// The pause that the Hub asks for, if it states one.
        seconds: Option<u64>,
        /// Whether the requests had a token, for which the Hub allows more of them.
        has_token: bool,
    },
    /// The server is overloaded or failed.
    #[error("HTTP {status}: the server is overloaded or failed; try again later")]
    Unavailable {
        /// The HTTP status.
        status: u16,
    },
    /// There is no such file.
    #[error("no such file (HTTP 404)")]
    NoFile,
    /// There are too many redirects.
    #[error("too many redirects")]
    Redirects,
    /// An upload request was redirected.
    #[error("redirected, which uploads do not follow")]
    Redirected,
    /// It is not a valid repository listing.
    #[error("not a listing of a repository: {source}")]
    Listing {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// It is not the expected JSON of an upload response.
    #[error("not the expected answer: {source}")]
    Upload {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// A file has no etag.
    #[error("no etag")]
    NoEtag,
    /// A file's etag cannot be used as a file name in the cache.
    #[error("an etag that is not a valid file name")]
    Etag,
}

/// Why a download is incomplete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadProblem {
    /// The connection was interrupted repeatedly.
    #[error("interrupted after {received}{} bytes: {cut}", size.map_or_else(String::new, |size| format!(" of {size}")))]
    Interrupted {
        /// Bytes received.
        received: u64,
        /// Size of the file, if the Hub states it.
        size: Option<u64>,
        /// How the last attempt ended.
        cut: Cut,
    },
    /// Its size differs from the size stated by the Hub.
    #[error("received {received} bytes, expected {size}")]
    Size {
        /// Bytes received.
        received: u64,
        /// Size of the file.
        size: u64,
    },
    /// Its hash differs from the hash stated by the Hub.
    #[error("its {kind} is {found}, expected {expected}")]
    Hash {
        /// `SHA-256` or `SHA-1`.
        kind: &'static str,
        /// Hexadecimal hash of the received data.
        found: String,
        /// The hash stated by the Hub.
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
    /// The server sent a different part of the file.
    #[error("unexpected range: {range}")]
    Range {
        /// The header `Content-Range`.
        range: String,
    },
    /// The server responded with an error.
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

/// Why a repository does not contain what is needed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepoProblem {
    /// It contains an adapter instead of a model.
    #[error("it is an adapter, not a model; specify it as base+adapter, or with --adapter")]
    Adapter,
    /// It contains a model instead of an adapter.
    #[error("it is a model, not an adapter (there is no adapter_config.json)")]
    Model,
    /// Its adapter is not stored as safetensors.
    #[error("it has only adapter_model.bin; convert it to safetensors first (PEFT's save_pretrained does)")]
    BinAdapter,
    /// It contains no adapter.
    #[error("it has no adapter_config.json with adapter_model.safetensors")]
    NoAdapter,
    /// Its model is not stored as safetensors.
    #[error("it has only .bin weights; convert them to safetensors first (Transformers' save_pretrained does)")]
    BinModel,
    /// Its model is in GGUF format.
    #[error("it has only GGUF files; download one, and convert it with `cl import-gguf`")]
    Gguf,
    /// It contains no model.
    #[error("it has no config.json with model.safetensors")]
    NoModel,
    /// Its index of shards is invalid.
    #[error("{index} is not an index: {source}")]
    Index {
        /// Name of the index.
        index: &'static str,
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// Its index lists a shard that is not a file of the repository.
    #[error("{index} lists `{shard}`, which is not a file in the same directory")]
    Shard {
        /// Name of the index.
        index: &'static str,
        /// The shard.
        shard: String,
    },
}

/// Why an upload failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UploadProblem {
    /// The Hub is set to offline.
    #[error("HF_HUB_OFFLINE is set; unset it to upload")]
    Offline,
    /// There is no token.
    #[error("uploading needs a token with write access; set HF_TOKEN, or save it in HF_HOME/token")]
    NoToken,
    /// The directory is a mixture of adapters.
    #[error("{path}: publishing a mixture of adapters is not supported yet; publish its adapters one by one")]
    Mixture {
        /// The directory.
        path: PathBuf,
    },
    /// A file differs from its manifest.
    #[error("{path}: differs from manifest.json; restore it or create it again")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The upload was stopped by a signal.
    #[error("stopped; the same command resumes it")]
    Stopped,
    /// The Hub rejects a file.
    #[error("{file}: {error}")]
    Refused {
        /// The file.
        file: String,
        /// The hub's error.
        error: Value,
    },
    /// The Hub announces an upload in parts, but does not state the address of a part.
    #[error("the Hub returned no address for part {part} of {count}")]
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
    /// The storage rejects a file.
    #[error("{file}: the storage answers HTTP {status}")]
    Storage {
        /// The file.
        file: String,
        /// The HTTP status.
        status: u16,
    },
    /// The storage failed repeatedly.
    #[error("{file}: {cut}; stored files are kept; run the same command to resume")]
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
