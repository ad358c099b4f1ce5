//! Model configuration: the parts of `config.json` that the decoder needs. Keys shared by all families are read here
//! and in [`keys`]; each family has its own file.

mod gemma;
mod granite;
mod keys;
mod llama;
mod mistral;
mod mixtral;
mod moellama;
mod olmo2;
mod phi3;
mod qwen;
mod qwen2_moe;
mod qwen3_moe;
mod rope;
mod seed_oss;
mod smollm3;

use std::path::Path;

use cl_moe::ExpertStorage;
use serde_json::{Map, Value};

pub use rope::RopeScaling;

use crate::ModelError;
use crate::problem::{ConfigProblem, RopeProblem};
use keys::Keys;

/// The supported architectures, by Hugging Face's `architectures[0]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`: Llama 1–3, SmolLM, SmolLM2.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `MixtralForCausalLM`: Mistral with experts instead of the MLP.
    Mixtral,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen2MoeForCausalLM`: Qwen2 with experts instead of the MLP, one of them shared by all tokens.
    Qwen2Moe,
    /// `Qwen3MoeForCausalLM`: Qwen3 with experts instead of the MLP.
    Qwen3Moe,
    /// `Qwen3ForCausalLM`: norms on each head of q and k.
    Qwen3,
    /// `SmolLM3ForCausalLM`: some layers have no rotary position embeddings.
    SmolLm3,
    /// `Gemma2ForCausalLM`: norms before and after each block, soft caps on attention scores and logits.
    Gemma2,
    /// `Gemma3ForCausalLM` (text only): sliding-window layers with separate rotary frequencies.
    Gemma3,
    /// `Phi3ForCausalLM`: Phi-3, Phi-4; q, k and v in one projection, gate and up in one.
    Phi3,
    /// `Olmo2ForCausalLM`: norms after each block, and over all heads of q and of k.
    Olmo2,
    /// `GraniteForCausalLM`: Llama with multipliers.
    Granite,
    /// `SeedOssForCausalLM`: biases on q, k and v, and optionally on o.
    SeedOss,
    /// `MoeLlamaForCausalLM` of the paper's tool: Llama with experts in any of its projections.
    MoeLlama,
    /// `MoeMistralForCausalLM` of the paper's tool: Mistral with experts in any of its projections.
    MoeMistral,
}

impl Family {
    /// All families with their name in `architectures[0]` and their `model_type`.
    const NAMES: [(Family, &'static str, &'static str); 18] = [
        (Family::Llama, "LlamaForCausalLM", "llama"),
        (Family::Mistral, "MistralForCausalLM", "mistral"),
        (Family::Mixtral, "MixtralForCausalLM", "mixtral"),
        (Family::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Family::Qwen2Moe, "Qwen2MoeForCausalLM", "qwen2_moe"),
        (Family::Qwen3Moe, "Qwen3MoeForCausalLM", "qwen3_moe"),
        (Family::Qwen3, "Qwen3ForCausalLM", "qwen3"),
        (Family::SmolLm3, "SmolLM3ForCausalLM", "smollm3"),
        (Family::Gemma2, "Gemma2ForCausalLM", "gemma2"),
        (Family::Gemma3, "Gemma3ForCausalLM", "gemma3_text"),
        (Family::Phi3, "Phi3ForCausalLM", "phi3"),
        (Family::Olmo2, "Olmo2ForCausalLM", "olmo2"),
        (Family::Granite, "GraniteForCausalLM", "granite"),
        (Family::SeedOss, "SeedOssForCausalLM", "seed_oss"),
        (Family::MoeLlama, "MoeLlamaForCausalLM", "moellama"),
        (Family::MoeMistral, "MoeMistralForCausalLM", "moemistral"),
        // Not from the paper's tool but our own: experts stored as differences from the base.
        (Family::MoeLlama, "DeltaMoeLlamaForCausalLM", "delta_moellama"),
        (Family::MoeMistral, "DeltaMoeMistralForCausalLM", "delta_moemistral"),
    ];

    /// The family of a config, determined by its architecture, or otherwise by its `model_type`.
    fn of(dir: &Path, json: &Map<String, Value>) -> Result<Family, ModelError> {
        let architecture = json.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = json.get("model_type").and_then(Value::as_str);
        let known = Family::NAMES.iter().find(|(_, class, kind)| match architecture {
            Some(name) => name == *class,
            None => model_type == Some(*kind),
        });
        known.map(|(family, ..)| *family).ok_or_else(|| ModelError::Architecture {
            path: dir.to_owned(),
            architecture: architecture.or(model_type).unwrap_or("(none named)").to_owned(),
            supported: Family::NAMES.map(|(_, class, _)| class).join(", "),
        })
    }
}

/// Activation function of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x), also called swish.
    Silu,
    /// GELU in its tanh approximation (`gelu_pytorch_tanh`).
    GeluTanh,
}

/// Placement of a layer's norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP.
    Pre,
    /// Before and after attention and MLP.
    PreAndPost,
    /// After attention and after the MLP.
    Post,
}

/// Norms applied to queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// No norms.
    None,
    /// On each head.
    Head,
    /// Over all heads together.
    Whole,
}

/// Settings of the experts that replace MLPs or projections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Naming scheme of the experts' tensors.
    pub layout: ExpertLayout,
    /// Whether experts are stored in full or as differences from the base.
    pub storage: ExpertStorage,
    /// Modules that consist of experts, in the layers given by `layers`.
    pub modules: Vec<ExpertModule>,
    /// Per layer: whether it has experts.
    pub layers: Vec<bool>,
    /// Inner width of an MLP that is an expert.
    pub intermediate_size: i64,
    /// Inner width of the shared expert.
    pub shared_intermediate_size: i64,
    /// Number of experts of each module, including the shared one.
    pub num_local_experts: i64,
    /// Whether the first expert is shared: every token uses it, in addition to the selected experts.
    pub shared: bool,
    /// How experts are selected.
    pub gating: ExpertGating,
    /// Number of experts selected for each token.
    pub num_experts_per_tok: i64,
    /// Whether the weights of the selected experts are renormalized to a sum of 1.
    pub norm_topk_prob: bool,
}

impl Experts {
    /// Whether a module of a layer consists of experts.
    pub(crate) fn has(&self, layer: usize, module: ExpertModule) -> bool {
        self.layers[layer] && self.modules.contains(&module)
    }

    /// Number of experts that the router selects from.
    pub fn routed(&self) -> i64 {
        self.num_local_experts - i64::from(self.shared)
    }

    /// Number of routers.
    pub fn routers(&self) -> usize {
        let of_module = |m: &ExpertModule| if *m == ExpertModule::MlpProjections { 3 } else { 1 };
        match self.gating {
            ExpertGating::Modules => {
                self.layers.iter().filter(|has| **has).count() * self.modules.iter().map(of_module).sum::<usize>()
            }
            ExpertGating::Global => 1,
            ExpertGating::Gateless => 0,
        }
    }
}

/// How the experts of a token are selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertGating {
    /// By a router in each module, which reads the module's input.
    Modules,
    /// By one router for all modules of all layers, which reads the token embeddings.
    Global,
    /// There is no selection: every token uses all experts, with equal weights.
    Gateless,
}

/// Naming scheme of the experts' tensors in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertLayout {
    /// Mixtral's `block_sparse_moe.gate` and `block_sparse_moe.experts.E.w1`.
    Mixtral,
    /// Qwen2-MoE's and Qwen3-MoE's `mlp.gate`, `mlp.experts.E.gate_proj`, `mlp.shared_expert.gate_proj` and `mlp.shared_expert_gate`.
    Qwen2Moe,
    /// The paper's tool: `mlp.router` and `mlp.experts.E.gate_proj`, `self_attn.q_proj.router` and
    /// `self_attn.q_proj.experts.E`.
    Moetify,
}

/// A module that consists of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertModule {
    /// The whole MLP.
    Mlp,
    /// `gate_proj`, `up_proj` and `down_proj`, each with its own router.
    MlpProjections,
    /// `q_proj`.
    Query,
    /// `k_proj`.
    Key,
    /// `v_proj`.
    Value,
    /// `o_proj`.
    Output,
}

/// The parts of `config.json` that the decoder needs; fields that correspond to a key have its name.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub family: Family,
    /// Number of rows of the embedding.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Inner width of the MLP; [`Experts`] has the width of MLPs that are experts.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: i64,
    /// Number of key and value heads; a divisor of the number of query heads.
    pub num_key_value_heads: i64,
    /// Dimension of one head.
    pub head_dim: i64,
    /// Number of leading entries of a head that are rotated; even.
    pub rotary_dim: i64,
    /// Epsilon that is added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Whether the weights of norms are stored as offsets from 1.
    pub norm_offset: bool,
    /// Placement of the norms in a layer.
    pub norms: NormPlacement,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Base of the rotary frequencies of sliding-window layers, without scaling, if it differs.
    pub rope_local_base_freq: Option<f64>,
    /// Maximum sequence length, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the output head shares its weight with the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v are fused into one projection, and gate and up into another.
    pub fused_projections: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub o_bias: bool,
    /// Whether the MLP has biases.
    pub mlp_bias: bool,
    /// Norms on q and k.
    pub qk_norm: QkNorm,
    /// Activation function of the MLP.
    pub hidden_act: Activation,
    /// Settings of the experts, if there are any.
    pub experts: Option<Experts>,
    /// Per layer: sliding window, the number of positions that a query attends to, including its own; `None` for full
    /// attention.
    pub windows: Vec<Option<i64>>,
    /// Per layer: whether it uses rotary position embeddings.
    pub uses_rope: Vec<bool>,
    /// Factor by which attention scores are multiplied; `None` for 1/√head_dim.
    pub attention_multiplier: Option<f64>,
    /// Soft cap `c` of attention scores: a score s becomes c · tanh(s / c).
    pub attn_logit_softcapping: Option<f64>,
    /// Soft cap `c` of logits: a logit l becomes c · tanh(l / c).
    pub final_logit_softcapping: Option<f64>,
    /// Factor by which embeddings are multiplied.
    pub embedding_multiplier: f64,
    /// Factor by which the outputs of attention and MLP are multiplied before they are added to the residual stream.
    pub residual_multiplier: f64,
    /// Divisor of logits.
    pub logits_scaling: f64,
    /// Token ids that end generation: those of config.json and, for a model from a directory, of
    /// generation_config.json.
    pub eos_token_ids: Vec<u32>,
    /// Repetition penalty of generation_config.json, which Transformers also applies to greedy decoding; 1 has no
    /// effect.
    pub repetition_penalty: f32,
}

impl ModelConfig {
    /// Reads the config of the model in `dir`.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] or [`ModelError::Config`].
    pub fn from_json(dir: &Path, json: &Map<String, Value>) -> Result<ModelConfig, ModelError> {
        let wrong = |problem| ModelError::Config { path: dir.to_owned(), problem };
        let family = Family::of(dir, json)?;
        let keys = Keys::read(json).map_err(wrong)?;
        let read = match family {
            Family::Llama => llama::read,
            Family::Mistral => mistral::read,
            Family::Mixtral => mixtral::read,
            Family::Qwen2 => qwen::read_qwen2,
            Family::Qwen2Moe => qwen2_moe::read,
            Family::Qwen3Moe => qwen3_moe::read,
            Family::Qwen3 => qwen::read_qwen3,
            Family::SmolLm3 => smollm3::read,
            Family::Gemma2 => gemma::read_gemma2,
            Family::Gemma3 => gemma::read_gemma3,
            Family::Phi3 => phi3::read,
            Family::Olmo2 => olmo2::read,
            Family::Granite => granite::read,
            Family::SeedOss => seed_oss::read,
            Family::MoeLlama => moellama::read_llama,
            Family::MoeMistral => moellama::read_mistral,
        };
        let config = read(&keys).map_err(wrong)?;
        config.validate().map_err(wrong)?;
        Ok(config)
    }

    /// Whether a tensor of this name can be ignored. Old files contain the rotary frequencies, which follow from the
    /// config, and some models with a tied head contain a copy of the embedding.
    pub(crate) fn is_redundant(&self, tensor: &str) -> bool {
        tensor.ends_with("rotary_emb.inv_freq") || (self.tie_word_embeddings && tensor == "lm_head.weight")
    }

    /// Checks that apply to all families, after defaults have been filled in.
    fn validate(&self) -> Result<(), ConfigProblem> {
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return Err(ConfigProblem::HeadGroups {
                num_attention_heads: self.num_attention_heads,
                num_key_value_heads: self.num_key_value_heads,
            });
        }
        if self.head_dim % 2 != 0 {
            return Err(RopeProblem::OddHead { head_dim: self.head_dim }.into());
        }
        if self.rotary_dim < 2 || self.rotary_dim % 2 != 0 || self.rotary_dim > self.head_dim {
            return Err(RopeProblem::RotaryWidth { rotary_dim: self.rotary_dim, head_dim: self.head_dim }.into());
        }
        let positive = [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("rope_local_base_freq", self.rope_local_base_freq.unwrap_or(1.0)),
            ("attention_multiplier", self.attention_multiplier.unwrap_or(1.0)),
            ("attn_logit_softcapping", self.attn_logit_softcapping.unwrap_or(1.0)),
            ("final_logit_softcapping", self.final_logit_softcapping.unwrap_or(1.0)),
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
        ];
        match positive.into_iter().find(|(_, value)| !value.is_finite() || *value <= 0.0) {
            Some((key, value)) => Err(ConfigProblem::NotPositive { key, value }),
            None => Ok(()),
        }
    }
}

/// Reads generation_config.json: adds its end-of-sequence ids, which Transformers uses first, and the repetition penalty.
pub(crate) fn add_generation_config(config: &mut ModelConfig, dir: &Path) -> Result<(), ModelError> {
    let path = dir.join("generation_config.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(()) };
    let invalid = |source| cl_checkpoint::Error::Json { path: path.clone(), source };
    let json: Value = serde_json::from_slice(&text).map_err(invalid)?;
    let wrong = |value| ModelError::EosTokenId { path: path.clone(), value };
    for id in eos_ids(json.get("eos_token_id")).map_err(wrong)? {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    if let Some(value) = json.get("repetition_penalty").filter(|value| !value.is_null()) {
        let penalty = value.as_f64().map(|penalty| penalty as f32).filter(|p| *p > 0.0 && p.is_finite());
        let wrong = || ModelError::RepetitionPenalty { path: path.clone(), value: value.clone() };
        config.repetition_penalty = penalty.ok_or_else(wrong)?;
    }
    Ok(())
}

/// Returns the token ids of a number or a list, or as an error the value that is not a token id.
fn eos_ids(value: Option<&Value>) -> Result<Vec<u32>, Value> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| v.clone());
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(extra: Value) -> Result<ModelConfig, ModelError> {
        let mut base = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2
        });
        for (k, v) in extra.as_object().unwrap() {
            base[k] = v.clone();
        }
        ModelConfig::from_json(Path::new("m"), base.as_object().unwrap())
    }

    #[test]
    fn windows_follow_the_family() {
        let windows = |extra| read(extra).unwrap().windows;
        assert_eq!(windows(json!({"sliding_window": 8})), [None; 4], "Llama has no window");
        assert_eq!(windows(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 8})), [Some(8); 4]);
        assert_eq!(windows(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null})), [None; 4]);
        assert_eq!(windows(json!({"architectures": ["MistralForCausalLM"]})), [Some(4096); 4]);
        let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": true,
            "max_window_layers": 3});
        assert_eq!(windows(qwen), [None, None, None, Some(8)]);
    }

    #[test]
    fn qwen3_moe_has_128_experts_of_which_8_are_selected_by_default() {
        let qwen = |extra: Value| {
            let mut json = json!({"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64, "hidden_size": 64,
                "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8});
            json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            ModelConfig::from_json(Path::new("m"), json.as_object().unwrap())
        };
        let plain = qwen(json!({})).unwrap();
        assert_eq!((plain.num_key_value_heads, plain.head_dim, plain.qkv_bias), (4, 8, false));
        assert_eq!(plain.windows, [None, None]);
        let experts = plain.experts.unwrap();
        let counts = (experts.num_local_experts, experts.num_experts_per_tok, experts.intermediate_size);
        assert_eq!((counts, experts.norm_topk_prob, experts.shared), ((128, 8, 768), false, false));
        // The key of Transformers 5 and that of earlier versions.
        for key in ["num_local_experts", "num_experts"] {
            assert_eq!(qwen(json!({key: 9})).unwrap().experts.unwrap().routed(), 9);
            let message = qwen(json!({key: 7})).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn seed_oss_has_biases_on_q_k_and_v_by_default() {
        let seed = |extra: Value| {
            let mut json = json!({"architectures": ["SeedOssForCausalLM"], "vocab_size": 64, "hidden_size": 32,
                "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16});
            json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            ModelConfig::from_json(Path::new("m"), json.as_object().unwrap()).unwrap()
        };
        let plain = seed(json!({}));
        assert_eq!((plain.qkv_bias, plain.o_bias, plain.mlp_bias), (true, false, false));
        assert_eq!((plain.num_key_value_heads, plain.head_dim, plain.max_position_embeddings), (8, 128, 524_288));
        let other = seed(json!({"attention_bias": false, "attention_out_bias": true, "mlp_bias": true}));
        assert_eq!((other.qkv_bias, other.o_bias, other.mlp_bias), (false, true, true));
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let old = read(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        let new = read(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope_scaling, RopeScaling::Linear { factor: 2.0 });
        let both = read(json!({"rope_theta": 777.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}));
        assert_eq!(both.unwrap().rope_theta, 5e5);
    }

    #[test]
    fn a_generation_follows_both_files() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = read(json!({"eos_token_id": 2})).unwrap();
        add_generation_config(&mut config, folder.path()).unwrap();
        assert_eq!(config.eos_token_ids, [2]);
        let file = folder.path().join("generation_config.json");
        std::fs::write(&file, r#"{"eos_token_id": [2, 7], "repetition_penalty": 1.05}"#).unwrap();
        add_generation_config(&mut config, folder.path()).unwrap();
        assert_eq!((config.eos_token_ids.as_slice(), config.repetition_penalty), (&[2, 7][..], 1.05));
        std::fs::write(&file, r#"{"eos_token_id": "x"}"#).unwrap();
        let message = add_generation_config(&mut config, folder.path()).unwrap_err().to_string();
        assert!(message.contains("generation_config.json") && message.contains("eos_token_id"), "{message}");
    }

    #[test]
    fn errors_name_key_and_value() {
        for (extra, parts) in [
            (json!({"architectures": ["GPT2LMHeadModel"]}), ["GPT2LMHeadModel", "supported: LlamaForCausalLM"]),
            (json!({"num_key_value_heads": 3}), ["num_attention_heads = 4", "num_key_value_heads = 3"]),
            (json!({"hidden_act": "gelu"}), ["gelu", "silu"]),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), ["yarn", "llama3"]),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), ["factor = 0", "positive"]),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), ["low_freq_factor", "number"]),
            (json!({"rope_theta": -1.0}), ["rope_theta = -1", "positive"]),
            (json!({"rms_norm_eps": -1e-5}), ["rms_norm_eps = -0.00001", "positive"]),
            (json!({"head_dim": 7}), ["head_dim = 7", "even"]),
            (json!({"hidden_size": 30}), ["hidden_size = 30", "num_attention_heads = 4"]),
            (
                json!({"num_hidden_layers": 1_000_000_000_000u64}),
                ["num_hidden_layers = 1000000000000", "at most 10000"],
            ),
            (json!({"num_hidden_layers": -1}), ["config.json", "-1"]),
            (
                json!({"architectures": ["MistralForCausalLM"], "sliding_window": 0}),
                ["sliding_window = 0", "at least 1"],
            ),
            (
                json!({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}),
                ["1 entries", "4 layers"],
            ),
            (json!({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}), ["1 entries", "4 layers"]),
            (json!({"hidden_size": "x"}), ["config.json", "invalid type"]),
            (json!({"hidden_size": 0}), ["hidden_size = 0", "at least 1"]),
            (json!({"eos_token_id": -3}), ["eos_token_id", "-3"]),
            (json!({"quantization_config": {"bits": 4}}), ["quantization_config", "bf16"]),
            (json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor = 0.5", "expected 1"]),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
                ["0.25", "expected 1"],
            ),
        ] {
            let message = read(extra).unwrap_err().to_string();
            assert!(parts.iter().all(|p| message.contains(p)), "{message}");
        }
    }
}
