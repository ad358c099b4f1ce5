//! Reasons why a checkpoint cannot be resumed from, as structured values;
//! [`TrainError::State`](crate::TrainError::State) adds the path.

/// Why a checkpoint does not match this run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateProblem {
    /// A file is missing.
    #[error("`{file}` is missing")]
    Missing {
        /// The name of the file.
        file: String,
    },
    /// A file has changed.
    #[error("`{file}` has changed since it was saved")]
    Changed {
        /// Its name.
        file: String,
    },
    /// A file does not belong to the checkpoint.
    #[error("`{file}` was not saved with it")]
    Unlisted {
        /// Its name.
        file: String,
    },
    /// A file is not JSON of the expected form.
    #[error("{source}")]
    Json {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The training settings differ.
    #[error("it was saved with a different [train] configuration")]
    Config,
    /// The random seed differs.
    #[error("it was saved with seed {saved}, but this run has seed {seed}")]
    Seed {
        /// Seed of the checkpoint.
        saved: u64,
        /// Seed of this run.
        seed: u64,
    },
    /// The training data differs.
    #[error("it was saved with different training data")]
    Data,
    /// The earlier adapters of the orthogonality penalty differ.
    #[error("it was saved with different earlier adapters")]
    Earlier,
    /// The validation settings or data differ.
    #[error("it was saved with different [validation] settings or data")]
    Validation,
    /// A tensor is missing, or has another shape.
    #[error("it has no tensor `{tensor}` of shape {shape:?}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// The expected shape.
        shape: Vec<usize>,
    },
}
