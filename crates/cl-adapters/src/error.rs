use std::path::PathBuf;

/// Why an adapter cannot be made, loaded, saved or folded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A hyper-parameter outside its range.
    #[error("{key} = {value}: expected {expected}")]
    Parameter {
        /// PEFT's key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// `target_modules` names a module that the model does not have.
    #[error("target_modules: `{target}` matches no layer of the model; it has {}", available.join(", "))]
    UnknownTarget {
        /// The entry that matched nothing.
        target: String,
        /// The last parts of the names of its linear layers.
        available: Vec<String>,
    },
    /// `target_modules` is a string that is neither `all-linear` nor a regular expression.
    #[error("target_modules: `{pattern}` is not a regular expression: {source}")]
    Pattern {
        /// The string.
        pattern: String,
        /// Why it does not parse.
        source: regex::Error,
    },
    /// An adapter holds a module that the model does not have.
    #[error("{path}: adapter module `{module}` is neither a linear layer nor the embedding of this model")]
    UnknownModule {
        /// Directory of the adapter.
        path: PathBuf,
        /// The module.
        module: String,
    },
    /// A factor does not fit the layer it belongs to.
    #[error("{path}: module `{module}`: expected A [r, {input}] and B [{output}, r], got A {a:?} and B {b:?}")]
    Shape {
        /// Directory of the adapter.
        path: PathBuf,
        /// The module.
        module: String,
        /// Input width of the layer.
        input: i64,
        /// Output width of the layer.
        output: i64,
        /// Shape of A as stored.
        a: Vec<usize>,
        /// Shape of B as stored.
        b: Vec<usize>,
    },
    /// A tensor that is not a factor cannot be taken up.
    #[error("{path}: tensor `{tensor}`: {problem}")]
    Whole {
        /// Directory of the adapter.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        #[source]
        problem: WholeProblem,
    },
    /// The adapter uses a PEFT feature that is not built.
    #[error("{path}: {feature} adapters are not supported; use a plain LoRA adapter")]
    Unsupported {
        /// Directory of the adapter.
        path: PathBuf,
        /// The feature.
        feature: String,
    },
    /// Files of the base or the adapter.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

/// Why a tensor of an adapter that is not a factor cannot be taken up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WholeProblem {
    /// Rows of tokens are for a module that the model does not have.
    #[error("rows of a module that this model does not have")]
    RowsOfNoModule,
    /// The base's weight is quantized.
    #[error("it replaces a weight that `base` quantizes; continue this adapter without `base`")]
    Quantized,
    /// Rows of tokens do not fit their ids or the embedding.
    #[error("rows {shape:?} for trainable_token_indices {ids:?}")]
    Rows {
        /// Shape of the rows.
        shape: Vec<i64>,
        /// The token ids.
        ids: Vec<i64>,
    },
    /// The tensor has another shape than its adapter needs.
    #[error("expected {expected:?}, its shape is {found:?}")]
    Shape {
        /// The shape needed.
        expected: Vec<i64>,
        /// Its shape.
        found: Vec<usize>,
    },
    /// The tensor has another shape than the base model's.
    #[error("its shape is {found:?}, the base model's {base:?}")]
    ShapeOfBase {
        /// Its shape.
        found: Vec<i64>,
        /// Shape of the base model's tensor.
        base: Vec<i64>,
    },
    /// The base model has no such tensor.
    #[error("neither a factor nor a tensor of the base model")]
    NotInBase,
    /// The tensor differs from the base model's, but is not marked as trained.
    #[error(
        "neither a factor nor the base model's own, and adapter_config.json does not say that `{module}` was trained"
    )]
    Untrained {
        /// Its module.
        module: String,
    },
}
