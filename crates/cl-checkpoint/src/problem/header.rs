/// Why a safetensors header does not match its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderProblem {
    /// The file is empty.
    #[error("the file is empty")]
    Empty,
    /// The file is too short for a header.
    #[error("{bytes} bytes, but a header needs at least 8")]
    TooShort {
        /// Size of the file.
        bytes: usize,
    },
    /// The file is the pointer that Git leaves in place of a file if Git LFS is not installed.
    #[error("is a Git LFS pointer instead of weights; run `git lfs pull` in its directory")]
    LfsPointer,
    /// The header would be longer than the file, or than the format allows.
    #[error(
        "the header claims {declared} bytes, but the file has {available} after its first 8 (a header can have \
         {limit}); truncated or another format"
    )]
    Length {
        /// Length of the header, as stored.
        declared: u64,
        /// Number of bytes in the file after the length.
        available: u64,
        /// The format's limit.
        limit: u64,
    },
    /// The header is not valid UTF-8.
    #[error("the header is not UTF-8: {source}")]
    NotUtf8 {
        /// The position of the first invalid byte.
        r#source: std::str::Utf8Error,
    },
    /// The header is not JSON.
    #[error("the header is not valid JSON: {source}")]
    Json {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The metadata are not an object of strings.
    #[error("__metadata__ is not a map of strings: {source}")]
    Metadata {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The tensors do not cover all of the data.
    #[error("the tensors end at byte {end} of {data} bytes of data; truncated header or trailing bytes")]
    End {
        /// End of the last tensor, relative to the data.
        end: usize,
        /// Number of bytes of data.
        data: usize,
    },
}
