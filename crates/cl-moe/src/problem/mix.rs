use cl_checkpoint::Dtype;
use serde_json::Value;

/// Why models do not make a mixture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MixProblem {
    /// Routers start from hidden states, but no file of them is given.
    #[error(
        "init = \"states\" needs a file, which `cl moe states CONFIG --out FILE` makes from the experts' prompts; name it in \
         router.states or --states"
    )]
    NoStates,
    /// A file of hidden states that routers do not start from.
    #[error("is read by init = \"states\" only; remove one of the two")]
    UnusedStates,
    /// Two settings that exclude each other.
    #[error("cannot be combined with {other}; keep one")]
    Exclusive {
        /// The key of the other.
        other: &'static str,
    },
    /// Settings of a router where there is none.
    #[error("gateless = true has no router; remove the table")]
    NoRouter,
    /// The output has no biases on q, k and v, but the base has.
    #[error(
        "{base} has biases on q, k and v, which Qwen2-MoE can hold and {output} cannot; mix whole MLPs with a shared_expert"
    )]
    Qwen2Biases {
        /// Architecture of the base.
        base: &'static str,
        /// Architecture of the output.
        output: &'static str,
    },
    /// The architecture of the base has no mixture.
    #[error(
        "architecture {architecture} has no mixture; LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM have"
    )]
    Architecture {
        /// The architecture.
        architecture: String,
    },
    /// The base has biases.
    #[error("{key} is true; mixtures have no such biases")]
    Biases {
        /// The key of config.json.
        key: &'static str,
    },
    /// Tensors of the base have no place in the output.
    #[error("{count} tensor(s) have no place in a mixture, `{first}` first")]
    Unplaced {
        /// How many.
        count: usize,
        /// The first.
        first: String,
    },
    /// The output cannot hold what is asked for.
    #[error("architecture = \"{architecture}\" {reason}; change {key} or architecture")]
    Output {
        /// The output.
        architecture: &'static str,
        /// What it can or cannot hold, in words.
        reason: &'static str,
        /// The key that asks for it.
        key: &'static str,
    },
    /// Modules are absent or named twice.
    #[error("expected some of mlp, mlp_fg, q_proj, k_proj, v_proj and o_proj, each once")]
    Modules,
    /// The MLP is mixed in two ways.
    #[error("mlp and mlp_fg are two ways to mix the same matrices; keep one")]
    TwoMlps,
    /// Routers start from hidden states that their modules do not read.
    #[error(
        "init = \"states\" knows the hidden states that enter a layer, which are not what o_proj and down_proj read; choose \
         another rule, or leave out o_proj and mlp_fg"
    )]
    StatesOfInput,
    /// The memory limit is too low.
    #[error(
        "at least {} MiB are needed to write the largest tensor, {} MiB are allowed; allow more with --memory",
        needed.div_ceil(1 << 20),
        allowed >> 20
    )]
    Memory {
        /// The limit in bytes.
        allowed: usize,
        /// Bytes that one thread needs.
        needed: usize,
    },
    /// Routers from updates where the sign of a direction is not known.
    #[error(
        "init = \"task_vectors\" is for routers that read a layer norm's output, which o_proj and down_proj do not; choose another \
         rule, or leave out o_proj and mlp_fg"
    )]
    TaskVectorsOfInput,
    /// A router on the embeddings, which no update reads.
    #[error("init = \"task_vectors\" is for routers of modules; choose another rule, or remove global_router")]
    GlobalTaskVectors,
    /// A shared expert beside experts that are differences.
    #[error("experts stored as differences have no shared expert; remove shared_expert, or store experts as full")]
    SharedDelta,
    /// The scale of the shared expert is 0 or not finite.
    #[error("{scale}; expected a finite number other than 0")]
    Scale {
        /// The scale.
        scale: f64,
    },
    /// No layers are chosen.
    #[error("is empty; leave it out for all layers")]
    NoLayers,
    /// A layer that the base does not have.
    #[error("there is no layer {layer}; the base has {count}, from 0")]
    Layer {
        /// The layer, from 0.
        layer: usize,
        /// Layers of the base.
        count: usize,
    },
    /// Configurations differ in a key that decides about shapes or values.
    #[error("`{key}` is {expert} in config.json, {base} in the base's")]
    Config {
        /// The key.
        key: &'static str,
        /// Its value in the expert.
        expert: Value,
        /// Its value in the base.
        base: Value,
    },
    /// A tensor cannot be mixed.
    #[error("tensor `{tensor}` is {dtype:?}; expected f32, f16 or bf16")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// A tensor has another shape in the base.
    #[error("tensor `{tensor}` is {expert:?}, {base:?} in the base")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        expert: Vec<usize>,
        /// Its shape in the base.
        base: Vec<usize>,
    },
    /// A tensor is missing.
    #[error("lacks tensor `{tensor}`")]
    Lacks {
        /// The tensor.
        tensor: String,
    },
    /// The base has more or fewer layers than it says.
    #[error("num_hidden_layers is {stated} in config.json, {found} layers have an MLP")]
    LayerCount {
        /// Number by config.json.
        stated: u64,
        /// Number of layers.
        found: usize,
    },
}
