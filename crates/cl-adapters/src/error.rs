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
    #[error("target_modules: `{target}` matches no layer of the model; it has {available}")]
    UnknownTarget {
        /// The entry that matched nothing.
        target: String,
        /// The last parts of the names of its linear layers.
        available: String,
    },
    /// `target_modules` is a string that is neither `all-linear` nor a regular expression.
    #[error("target_modules: `{pattern}` is not a regular expression: {message}")]
    Pattern {
        /// The string.
        pattern: String,
        /// Why it does not parse.
        message: String,
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
    #[error("{path}: tensor `{tensor}`: {message}")]
    Whole {
        /// Directory of the adapter.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        message: String,
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
