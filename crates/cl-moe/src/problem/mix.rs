use cl_checkpoint::Dtype;
use serde_json::Value;

/// Why models cannot form a mixture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MixProblem {
    /// Routers are initialized from hidden states, but no file of hidden states is given.
    #[error(
        "init = \"states\" needs a file, which `cl moe states CONFIG --out FILE` writes from the experts' prompts; \
         specify it in router.states or with --states"
    )]
    NoStates,
    /// A file of hidden states is given, but routers are not initialized from it.
    #[error("is used only with init = \"states\"; set init = \"states\", or remove it")]
    UnusedStates,
    /// Two settings that exclude each other.
    #[error("cannot be combined with {other}; keep one")]
    Exclusive {
        /// The other key.
        other: &'static str,
    },
    /// A router is configured, but there is none.
    #[error("with gateless = true there is no router; remove [router]")]
    NoRouter,
    /// The base has biases on q, k and v, which the output architecture does not have.
    #[error(
        "{base} has biases on q, k and v, which {output} does not support; use modules = [\"mlp\"] and a \
         shared_expert, so that the output is a Qwen2-MoE"
    )]
    Qwen2Biases {
        /// Architecture of the base.
        base: &'static str,
        /// Architecture of the output.
        output: &'static str,
    },
    /// There is no mixture for the architecture of the base.
    #[error(
        "mixtures of {architecture} are not supported; supported: LlamaForCausalLM, MistralForCausalLM and \
         Qwen2ForCausalLM"
    )]
    Architecture {
        /// The architecture.
        architecture: String,
    },
    /// The base has biases.
    #[error("{key} is true, but mixtures do not support these biases")]
    Biases {
        /// The key of config.json.
        key: &'static str,
    },
    /// Tensors of the base have no place in the output.
    #[error("{count} tensor(s) cannot be part of a mixture; the first is `{first}`")]
    Unplaced {
        /// Number of such tensors.
        count: usize,
        /// The first of them.
        first: String,
    },
    /// The output architecture does not support a setting.
    #[error("architecture = \"{architecture}\" {reason}; change {key} or architecture")]
    Output {
        /// Name of the architecture.
        architecture: &'static str,
        /// A phrase that describes what it supports.
        reason: &'static str,
        /// The key of the setting.
        key: &'static str,
    },
    /// Modules are missing or named twice.
    #[error("expected one or more of mlp, mlp_fg, q_proj, k_proj, v_proj and o_proj, each at most once")]
    Modules,
    /// The MLP is replaced in two ways.
    #[error("mlp and mlp_fg are two ways to mix the same matrices; keep one")]
    TwoMlps,
    /// Routers are initialized from hidden states that are not the input of their modules.
    #[error(
        "init = \"states\" uses the input of a layer, which is not the input of o_proj and down_proj; choose another \
         init, or remove o_proj and mlp_fg from modules"
    )]
    StatesOfInput,
    /// The memory limit is too low.
    #[error(
        "at least {} MiB are needed to write the largest tensor, but only {} MiB are allowed; allow more with --memory",
        needed.div_ceil(1 << 20),
        allowed >> 20
    )]
    Memory {
        /// The limit in bytes.
        allowed: usize,
        /// Bytes that one thread needs.
        needed: usize,
    },
    /// Routers are initialized from updates for which the sign of a direction cannot be determined.
    #[error(
        "init = \"task_vectors\" supports only routers whose input is the output of a layer norm, unlike the routers \
         of o_proj and down_proj; choose another init, or remove o_proj and mlp_fg from modules"
    )]
    TaskVectorsOfInput,
    /// A router on the embeddings is initialized from updates, which do not read the embeddings.
    #[error("init = \"task_vectors\" does not support a global router; choose another init, or remove global_router")]
    GlobalTaskVectors,
    /// A shared expert is combined with experts stored as differences.
    #[error("experts stored as differences have no shared expert; remove shared_expert, or store experts as full")]
    SharedDelta,
    /// The scale of the shared expert is 0 or not finite.
    #[error("{scale}; expected a finite number other than 0")]
    Scale {
        /// The scale.
        scale: f64,
    },
    /// The list of layers is empty.
    #[error("is empty; leave it out for all layers")]
    NoLayers,
    /// A layer does not exist in the base.
    #[error("there is no layer {layer}; the base has {count}, from 0")]
    Layer {
        /// The layer, from 0.
        layer: usize,
        /// Layers of the base.
        count: usize,
    },
    /// A layer is named more than once.
    #[error("names layer {layer} twice; name each layer once")]
    LayerTwice {
        /// The layer, from 0.
        layer: usize,
    },
    /// Expert and base differ in a key of config.json that determines shapes or values.
    #[error("`{key}` is {expert} in config.json, but {base} in the config.json of the base")]
    Config {
        /// The key.
        key: &'static str,
        /// Its value in the expert.
        expert: Value,
        /// Its value in the base.
        base: Value,
    },
    /// A tensor has a dtype that cannot be mixed.
    #[error("tensor `{tensor}` is {dtype:?}; expected f32, f16 or bf16")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// A tensor has another shape in the base.
    #[error("tensor `{tensor}` has shape {expert:?}, but {base:?} in the base")]
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
    /// An expert has tensors in a module that is taken from it, which the base lacks.
    #[error(
        "{count} tensor(s) of the selected modules are not in the base and would be lost; the first is `{first}`. Use \
         an expert without additional tensors, or remove the module from `modules`"
    )]
    Beside {
        /// Number of such tensors.
        count: usize,
        /// The first of them.
        first: String,
    },
    /// The number of layers in the base differs from its config.json.
    #[error("num_hidden_layers is {stated} in config.json, but {found} layers have an MLP")]
    LayerCount {
        /// Number in config.json.
        stated: u64,
        /// Number of layers that were found.
        found: usize,
    },
}
