use std::path::PathBuf;

use crate::problem::ConfigProblem;

/// Why a model cannot be built, run or saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// An architecture that is not built.
    #[error("{path}: architecture `{architecture}` is not supported; supported: {supported}")]
    Architecture {
        /// Directory of the model.
        path: PathBuf,
        /// What its config.json names.
        architecture: String,
        /// What is built.
        supported: String,
    },
    /// config.json lacks a key, or holds a value that cannot be used.
    #[error("{path}/config.json: {problem}")]
    Config {
        /// Directory of the model.
        path: PathBuf,
        /// What is wrong.
        #[source]
        problem: ConfigProblem,
    },
    /// An end of sequence that is not a token id.
    #[error("{path}: eos_token_id {value} is not a token id")]
    EosTokenId {
        /// The generation_config.json.
        path: PathBuf,
        /// The value.
        value: serde_json::Value,
    },
    /// A tensor has another shape than config.json implies.
    #[error("{path}: tensor `{tensor}`: config.json implies {expected:?}, the file has {got:?}")]
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
    /// A tensor is stored in a dtype that a model is not made of.
    #[error("{path}: tensor `{tensor}` has dtype {dtype}; expected {expected}")]
    Dtype {
        /// Directory of the model.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Its dtype as stored.
        dtype: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Tensors that config.json implies are not there, or tensors are there that it does not.
    #[error("{path}: tensors do not match config.json; missing: [{missing}]; not used: [{unused}]")]
    Tensors {
        /// Directory of the model.
        path: PathBuf,
        /// Names that were expected.
        missing: String,
        /// Names that nothing reads.
        unused: String,
    },
    /// Experts that are differences from the base cannot be written again beside other weights.
    #[error(
        "{path}: experts are stored as differences from the base ({storage}), which holds for its own weights only; train an \
         adapter or the routers, or make the mixture with full experts"
    )]
    DeltaExperts {
        /// The output.
        path: PathBuf,
        /// How they are stored.
        storage: cl_moe::ExpertStorage,
    },
    /// A weight has no quantized form.
    #[error("tensor `{tensor}`: {source}; train without `base`")]
    Quantization {
        /// Name of the tensor.
        tensor: String,
        /// Why.
        source: cl_torch::TorchError,
    },
    /// Quantized weights would be saved as a model.
    #[error("{path}: the weights in memory are quantized ({format}); fold the adapter into the base's own directory")]
    Quantized {
        /// The output.
        path: PathBuf,
        /// The format.
        format: &'static str,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}; is this the model's own tokenizer?")]
    TokenId {
        /// The id.
        id: i64,
        /// Rows of the embedding.
        vocab_size: i64,
    },
    /// A sequence without tokens.
    #[error("sequence {index} is empty; a model needs at least one token (a tokenizer without BOS makes none of \"\")")]
    EmptySequence {
        /// Position of the sequence in the request.
        index: usize,
    },
    /// A setting of generation outside its range.
    #[error("{name} is {got}; expected {expected}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// Its value.
        got: String,
        /// Its range.
        expected: &'static str,
    },
    /// The model computes something else than numbers.
    #[error(
        "the model's logits are NaN: weights or an adapter hold NaN or infinities, or values overflow; `cl check DIR` says where, or compute in f32"
    )]
    NotANumber,
    /// Adapters.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// Mixtures of adapters.
    #[error(transparent)]
    Mixture(Box<cl_moe::Error>), // large for an error
    /// Files.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// Tokenizer and examples.
    #[error(transparent)]
    Data(#[from] cl_data::Error),
    /// libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

impl From<cl_moe::Error> for ModelError {
    fn from(error: cl_moe::Error) -> ModelError {
        ModelError::Mixture(Box::new(error))
    }
}
