/// Why a safetensors header does not describe its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderProblem {
    /// The file has no bytes.
    #[error("the file is empty")]
    Empty,
    /// The file is too short for a header.
    #[error("{bytes} bytes, but a header needs at least 8")]
    TooShort {
        /// Size of the file.
        bytes: usize,
    },
    /// The header would be longer than the file or the format allows.
    #[error(
        "the header claims {declared} bytes, the file has {available} after its first 8 (a header may have {limit}); \
         truncated or another format"
    )]
    Length {
        /// Length of the header as stored.
        declared: u64,
        /// Bytes of the file after the length.
        available: u64,
        /// The format's limit.
        limit: u64,
    },
    /// The header is not text.
    #[error("the header is not UTF-8: {source}")]
    NotUtf8 {
        /// Where.
        source: std::str::Utf8Error,
    },
    /// The header is not JSON.
    #[error("the header is not valid JSON: {source}")]
    Json {
        /// The parser's error.
        source: serde_json::Error,
    },
    /// The metadata are not texts by name.
    #[error("__metadata__ is not a map of strings: {source}")]
    Metadata {
        /// The parser's error.
        source: serde_json::Error,
    },
    /// The tensors do not take all of the data.
    #[error("the tensors end at byte {end} of {data} bytes of data; truncated header or trailing bytes")]
    End {
        /// Where the last tensor ends, in the data.
        end: usize,
        /// Bytes of data.
        data: usize,
    },
}
