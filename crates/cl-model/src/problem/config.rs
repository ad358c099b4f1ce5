use super::{ExpertsProblem, RopeProblem};

/// What is wrong with a model's `config.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// A key is missing, or its value has the wrong type.
    #[error("{source}")]
    Json {
        /// The parser's error.
        #[from]
        r#source: serde_json::Error,
    },
    /// A number is too small.
    #[error("{key} = {value}: expected at least {least}")]
    TooSmall {
        /// The key.
        key: &'static str,
        /// Its value.
        value: i64,
        /// The smallest allowed value.
        least: i64,
    },
    /// A number is too large.
    #[error("{key} = {value}: expected at most {most}")]
    TooLarge {
        /// The key.
        key: &'static str,
        /// Its value.
        value: i64,
        /// The largest allowed value.
        most: i64,
    },
    /// A number is not positive, or not finite.
    #[error("{key} = {value}: expected a positive number")]
    NotPositive {
        /// The key.
        key: &'static str,
        /// Its value.
        value: f64,
    },
    /// A feature that is not supported is enabled.
    #[error("{key} = true is not supported; expected false")]
    UnsupportedTrue {
        /// The key.
        key: &'static str,
    },
    /// The weights are quantized.
    #[error("quantization_config: quantized weights are not supported; save the model in f32, f16 or bf16")]
    Quantized,
    /// An activation function is not supported.
    #[error("{key} `{name}` is not supported; expected `silu` or `gelu_pytorch_tanh`")]
    Activation {
        /// The key.
        key: &'static str,
        /// Name of the function.
        name: String,
    },
    /// The head dimension is neither given nor an integer quotient of the other sizes.
    #[error(
        "hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_attention_heads}, and head_dim is \
         absent"
    )]
    HeadWidth {
        /// Width of the residual stream.
        hidden_size: i64,
        /// Query heads.
        num_attention_heads: i64,
    },
    /// The number of query heads is not a multiple of the number of key and value heads.
    #[error(
        "num_attention_heads = {num_attention_heads} is not a multiple of num_key_value_heads = {num_key_value_heads}"
    )]
    HeadGroups {
        /// Query heads.
        num_attention_heads: i64,
        /// Key and value heads.
        num_key_value_heads: i64,
    },
    /// A list that needs one entry per layer has another length.
    #[error("{key} has {entries} entries for {layers} layers")]
    LayerCount {
        /// The key.
        key: &'static str,
        /// Number of entries.
        entries: usize,
        /// Number of layers.
        layers: usize,
    },
    /// A type of layer is not supported.
    #[error("layer type `{name}` is not supported; expected full_attention or sliding_attention")]
    LayerType {
        /// Its name.
        name: String,
    },
    /// An end-of-sequence id is not a token id.
    #[error("eos_token_id {value} is not a token id")]
    EosTokenId {
        /// The value.
        value: serde_json::Value,
    },
    /// A problem of the rotary position embeddings.
    #[error(transparent)]
    Rope(#[from] RopeProblem),
    /// A problem of the experts.
    #[error(transparent)]
    Experts(#[from] ExpertsProblem),
}
