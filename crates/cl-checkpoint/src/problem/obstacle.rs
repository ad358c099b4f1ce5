/// Why an existing output is not replaced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// It is a dangling symbolic link.
    #[error("is a dangling symbolic link")]
    DanglingLink,
    /// It is a file.
    #[error("is a file")]
    File,
    /// It is a directory with other content than a model or an adapter.
    #[error("contains neither a manifest.json written by this program nor a model or an adapter")]
    Unknown,
    /// It contains a file that this program did not write.
    #[error("contains `{file}`, which was not written by this program")]
    Foreign {
        /// Path of the file relative to the output.
        file: String,
    },
}
