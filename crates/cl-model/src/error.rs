use std::path::PathBuf;

use crate::problem::ConfigProblem;

/// Errors of building, running or saving a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The architecture is not supported.
    #[error("{path}: architecture `{architecture}` is not supported; supported: {supported}")]
    Architecture {
        /// Directory of the model.
        path: PathBuf,
        /// Architecture named in config.json.
        architecture: String,
        /// Supported architectures.
        supported: String,
    },
    /// config.json lacks a key or has an invalid value.
    #[error("{path}/config.json: {problem}")]
    Config {
        /// Directory of the model.
        path: PathBuf,
        /// What is wrong.
        problem: ConfigProblem,
    },
    /// An end-of-sequence id is not a token id.
    #[error("{path}: eos_token_id {value} is not a token id")]
    EosTokenId {
        /// The generation_config.json file.
        path: PathBuf,
        /// The value.
        value: serde_json::Value,
    },
    /// The repetition penalty of a model is not a positive number.
    #[error("{path}: repetition_penalty {value} is not a number above 0")]
    RepetitionPenalty {
        /// The generation_config.json file.
        path: PathBuf,
        /// The value.
        value: serde_json::Value,
    },
    /// The shape of a tensor differs from what config.json implies.
    #[error("{path}: tensor `{tensor}`: config.json implies {expected:?}, but the file has {got:?}")]
    Shape {
        /// Directory of the model.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Implied shape.
        expected: Vec<i64>,
        /// Stored shape.
        got: Vec<i64>,
    },
    /// A tensor has a dtype that weights cannot have.
    #[error("{path}: tensor `{tensor}` has dtype {dtype}; expected {expected}")]
    Dtype {
        /// Directory of the model.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Its stored dtype.
        dtype: String,
        /// Expected dtypes.
        expected: &'static str,
    },
    /// Tensors implied by config.json are missing, or there are tensors that it does not imply.
    #[error("{path}: tensors do not match config.json; missing: [{missing}]; not used: [{unused}]")]
    Tensors {
        /// Directory of the model.
        path: PathBuf,
        /// Names of missing tensors.
        missing: String,
        /// Names of unused tensors.
        unused: String,
    },
    /// Experts stored as differences from the base cannot be saved, because the other weights may have changed.
    #[error(
        "{path}: experts are stored as differences from the base ({storage}), so full fine-tuning is not supported; \
         train an adapter or the routers, or build the mixture with expert_storage = \"full\""
    )]
    DeltaExperts {
        /// The output directory.
        path: PathBuf,
        /// How they are stored.
        storage: cl_moe::ExpertStorage,
    },
    /// A weight cannot be quantized.
    #[error("tensor `{tensor}`: {source}; train without `base`")]
    Quantization {
        /// Name of the tensor.
        tensor: String,
        /// The reason.
        r#source: cl_torch::TorchError,
    },
    /// The model cannot be saved because its weights in memory are quantized.
    #[error("{path}: the weights in memory are quantized ({format}); fold the adapter into the base's own directory")]
    Quantized {
        /// The output directory.
        path: PathBuf,
        /// The quantization format.
        format: &'static str,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}; is this the model's own tokenizer?")]
    TokenId {
        /// The id.
        id: i64,
        /// Number of rows of the embedding.
        vocab_size: i64,
    },
    /// A sequence has no tokens.
    #[error("sequence {index} is empty; a model needs at least one token (without BOS, an empty text has no tokens)")]
    EmptySequence {
        /// Position of the sequence in the request.
        index: usize,
    },
    /// A continuation has no token that could be scored.
    #[error(
        "the continuation {continuation:?} after {context:?} adds no token to its context, so it has no \
         log-likelihood; choose other texts, or another target_delimiter"
    )]
    NoContinuation {
        /// End of the context.
        context: String,
        /// The continuation.
        continuation: String,
    },
    /// A continuation has more tokens than the model can predict at once.
    #[error(
        "the continuation {continuation:?} has {tokens} tokens, more than the maximum length of {max_length}; \
         shorten it, or raise max_length if it is below the model's context"
    )]
    LongContinuation {
        /// Start of the continuation.
        continuation: String,
        /// Number of its tokens.
        tokens: usize,
        /// Maximum length of a sequence.
        max_length: usize,
    },
    /// A generation setting is outside its range.
    #[error("{name} is {got}; expected {expected}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// Its value.
        got: String,
        /// Its range.
        expected: &'static str,
    },
    /// The model's logits are NaN.
    #[error(
        "the model's logits are NaN: the weights or an adapter contain NaN or infinities, or values overflow; run \
         `cl check DIR` to find non-finite weights, or use --precision f32"
    )]
    NotANumber,
    /// An error of adapters.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// An error of mixtures of adapters.
    #[error(transparent)]
    Mixture(Box<cl_moe::Error>), // boxed because it is large
    /// An error of checkpoint files.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// An error of the tokenizer or of examples.
    #[error(transparent)]
    Data(#[from] cl_data::Error),
    /// An error of libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

impl From<cl_moe::Error> for ModelError {
    fn from(error: cl_moe::Error) -> ModelError {
        ModelError::Mixture(Box::new(error))
    }
}
