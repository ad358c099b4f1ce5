use std::path::PathBuf;

/// Errors of creating, loading, saving or folding an adapter.
///
/// Messages are complete: they include the messages of their causes, and `source` returns none of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A hyperparameter is outside its range.
    #[error("{key} = {value}: expected {expected}")]
    Parameter {
        /// PEFT's key.
        key: &'static str,
        /// The given value.
        value: String,
        /// The allowed values.
        expected: &'static str,
    },
    /// `target_modules` names a module that the model does not have.
    #[error("target_modules: `{target}` matches no layer of the model; it has {}{}", available.join(", "), hint(target, available))]
    UnknownTarget {
        /// The entry that matched nothing.
        target: String,
        /// Last components of the names of the model's linear layers.
        available: Vec<String>,
    },
    /// `target_modules` is a string that is neither `all-linear` nor a regular expression.
    #[error("target_modules: `{pattern}` is not a regular expression: {source}")]
    Pattern {
        /// The string.
        pattern: String,
        /// Why it does not parse.
        r#source: regex::Error,
    },
    /// An adapter has a module that the model does not have.
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
        /// Stored shape of A.
        a: Vec<usize>,
        /// Stored shape of B.
        b: Vec<usize>,
    },
    /// A tensor that is not a factor cannot be loaded.
    #[error("{path}: tensor `{tensor}`: {problem}")]
    Whole {
        /// Directory of the adapter.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: WholeProblem,
    },
    /// An embedding or output head has a magnitude vector.
    #[error(
        "{path}: module `{module}` uses DoRA, which is supported only for the linear layers of the blocks; \
         fold the adapter into the model with `cl adapter fold`"
    )]
    DoraOutside {
        /// Directory of the adapter.
        path: PathBuf,
        /// The embedding or the output head.
        module: String,
    },
    /// The adapter uses a PEFT feature that is not supported.
    #[error("{path}: {feature} adapters are not supported; use a plain LoRA adapter")]
    Unsupported {
        /// Directory of the adapter.
        path: PathBuf,
        /// The feature.
        feature: String,
    },
    /// An error of checkpoint files.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// An error of libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

/// Why a tensor of an adapter that is not a factor cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WholeProblem {
    /// Token rows belong to a module that the model does not have.
    #[error("rows of a module that this model does not have")]
    RowsOfNoModule,
    /// The base's weight, which the tensor replaces, is quantized.
    #[error("it replaces a weight that `base` quantizes; continue this adapter without `base`")]
    Quantized,
    /// Token rows do not match their ids or the embedding.
    #[error("rows {shape:?} for trainable_token_indices {ids:?}")]
    Rows {
        /// Shape of the rows.
        shape: Vec<i64>,
        /// The token ids.
        ids: Vec<i64>,
    },
    /// The shape of the tensor differs from what the adapter needs.
    #[error("expected {expected:?}, but its shape is {found:?}")]
    Shape {
        /// The needed shape.
        expected: Vec<i64>,
        /// Its shape.
        found: Vec<usize>,
    },
    /// The shape of the tensor differs from the base model's.
    #[error("its shape is {found:?}, but that of the base model is {base:?}")]
    ShapeOfBase {
        /// Its shape.
        found: Vec<i64>,
        /// Shape of the base model's tensor.
        base: Vec<i64>,
    },
    /// The base model has no such tensor.
    #[error("is neither a LoRA factor nor a tensor of the base model")]
    NotInBase,
    /// The tensor differs from the base model's, but is not marked as trained.
    #[error(
        "is neither a LoRA factor nor a copy of the base model's tensor, and adapter_config.json does not list \
         `{module}` as trained"
    )]
    Untrained {
        /// Its module.
        module: String,
    },
}

/// Tells what a `target_modules` that matches nothing was probably meant to be.
fn hint(target: &str, available: &[String]) -> String {
    if target.eq_ignore_ascii_case("all_linear") || target.eq_ignore_ascii_case("all linear") {
        "; did you mean \"all-linear\"?".to_owned()
    } else if available.iter().any(|name| name == target) {
        format!("; a string is a regular expression for whole names, so write [\"{target}\"]")
    } else {
        String::new()
    }
}
