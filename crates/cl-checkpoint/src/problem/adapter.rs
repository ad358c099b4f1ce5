/// What is wrong with an adapter directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterProblem {
    /// The rank is 0.
    #[error("r = 0: expected a rank of at least 1")]
    RankZero,
    /// A rank of `rank_pattern` is 0.
    #[error("rank_pattern `{key}` = 0: expected a rank of at least 1")]
    PatternRankZero {
        /// The key.
        key: String,
    },
    /// A key of a pattern is not a regular expression.
    #[error("{map} `{key}` is not a regular expression: {source}")]
    Pattern {
        /// `rank_pattern` or `alpha_pattern`.
        map: &'static str,
        /// The key.
        key: String,
        /// The error of the crate `regex`.
        r#source: regex::Error,
    },
    /// The adapter is of a kind that is not supported.
    #[error("{feature} adapters are not supported; use a plain LoRA adapter")]
    Unsupported {
        /// The first unsupported feature, as [`AdapterConfig::not_built`](crate::AdapterConfig::not_built) returns it.
        feature: String,
    },
    /// A factor has no matching second factor.
    #[error("tensor `{tensor}` has no counterpart; both lora_A and lora_B are needed")]
    NoCounterpart {
        /// The tensor.
        tensor: String,
    },
    /// The name of a factor differs from PEFT's.
    #[error("tensor `{tensor}`: expected a name that starts with `{prefix}`")]
    Prefix {
        /// The tensor.
        tensor: String,
        /// The expected prefix.
        prefix: &'static str,
    },
    /// The rank of a module's factors differs from the configuration.
    #[error("module `{module}`: adapter_config.json implies rank {rank}, lora_A is {a:?} and lora_B is {b:?}")]
    Rank {
        /// The module.
        module: String,
        /// The rank according to the configuration.
        rank: usize,
        /// Shape of `lora_A`.
        a: Vec<usize>,
        /// Shape of `lora_B`.
        b: Vec<usize>,
    },
    /// There are no factors.
    #[error("no lora_A and lora_B tensors")]
    NoFactors,
    /// A module of a DoRA adapter has no magnitude.
    #[error("module `{module}`: use_dora is set, but there is no magnitude vector")]
    NoMagnitude {
        /// The module.
        module: String,
    },
    /// A module has a magnitude, but the adapter is not DoRA.
    #[error("module `{module}` has a magnitude vector, but use_dora is not set in adapter_config.json")]
    Magnitude {
        /// The module.
        module: String,
    },
    /// The length of a magnitude differs from the number of rows of its module.
    #[error("module `{module}`: expected a magnitude of {expected} values, but its shape is {shape:?}")]
    MagnitudeShape {
        /// The module.
        module: String,
        /// Number of rows of the module.
        expected: usize,
        /// Shape of the magnitude.
        shape: Vec<usize>,
    },
    /// Tensors that the configuration marks as trained are missing.
    #[error(
        "{key}{} names trained tensors that adapter_model.safetensors does not contain; save the adapter again with its \
         PEFT version", entry.as_ref().map_or_else(String::new, |entry| format!(" (`{entry}`)"))
    )]
    MissingTrained {
        /// The key of the configuration.
        key: &'static str,
        /// The entry of `modules_to_save` without tensors.
        entry: Option<String>,
    },
    /// The number of trained rows of an embedding differs from the number of token ids.
    #[error("tensor `{tensor}` is {shape:?}, but trainable_token_indices has {ids} different ids for it")]
    Rows {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Number of distinct ids.
        ids: usize,
    },
    /// A bias of an update is unexpected, or its length differs from the number of rows of `lora_B`.
    #[error(
        "tensor `{tensor}` is {shape:?}; expected lora_bias = true in adapter_config.json and one value for each row of \
         lora_B"
    )]
    UpdateBias {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A parameter of `target_parameters` is not supported, or contradicts the weights.
    #[error(
        "target_parameters `{parameter}`: {reason}; supported are gate_up_proj and down_proj of `mlp.experts` (Mixtral, \
         Qwen2-MoE, Qwen3-MoE) and weights of two dimensions, such as mlp.gate.weight; otherwise merge the adapter with \
         PEFT (merge_and_unload) and use the merged model"
    )]
    TargetParameter {
        /// The parameter.
        parameter: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The factors of a parameter of `target_parameters` have other shapes than its rank implies.
    #[error(
        "target_parameters `{parameter}`: adapter_config.json implies rank {rank}, lora_A is {a:?} and lora_B is {b:?}; \
         expected [E·{rank}, in] and [out, E·{rank}] for E fused experts, with an even out for gate_up_proj, and E = 1 for \
         a weight of two dimensions; save the adapter again with its PEFT version"
    )]
    TargetParameterShape {
        /// The parameter.
        parameter: String,
        /// The rank according to the configuration.
        rank: usize,
        /// Shape of `lora_A`.
        a: Vec<usize>,
        /// Shape of `lora_B`.
        b: Vec<usize>,
    },
}
