use std::path::{Path, PathBuf};

use cl_checkpoint::{Dtype, HubSnapshot};
use serde::{Deserialize, Serialize};

use crate::ExpertStorage;

/// Configuration of a mixture of models, as in a TOML file.
///
/// ```
/// let config: cl_moe::MixConfig = toml::from_str(
///     r#"
///     base_model = "models/base"
///     num_experts_per_tok = 1
///     router.init = "base"
///     [[experts]]
///     model = "models/math"
///     [[experts]]
///     model = "models/code"
///     "#,
/// )?;
/// assert_eq!(config.experts.len(), 2);
/// # Ok::<(), toml::de::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixConfig {
    /// Model directory from which everything except the experts is taken.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub base_model: PathBuf,
    /// Architecture of the output; defaults to [`MixConfig::architecture`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<MixArchitecture>,
    /// Number of experts that are selected for each token; defaults to 2 (1 if there is a single expert), and to all
    /// without a router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_experts_per_tok: Option<usize>,
    /// Modules that consist of experts; each has its own router, `mlp_fg` has three.
    #[serde(default = "mlp", skip_serializing_if = "is_mlp")]
    pub modules: Vec<MixModule>,
    /// Layers that have experts; defaults to all. The other layers are the base's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Dtype of the output; defaults to that of the base's embedding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<FloatType>,
    /// How experts are stored: `full`, `lowrank:R` or `bitdelta`.
    #[serde(default, skip_serializing_if = "is_full")]
    pub expert_storage: ExpertStorage,
    /// Whether there are no routers: every token uses all experts, and a module's output is the mean of theirs.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gateless: bool,
    /// Whether a single router on the token embeddings selects the experts of all modules of all layers.
    #[serde(default, skip_serializing_if = "is_false")]
    pub global_router: bool,
    /// How routers are initialized.
    #[serde(default)]
    pub router: RouterConfig,
    /// A shared expert that every token uses in addition to the selected ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_expert: Option<SharedExpert>,
    /// The experts, in order.
    pub experts: Vec<ExpertConfig>,
}

/// A shared expert, which every token uses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// Model directory from which its modules are taken.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Factor by which its output is multiplied. The gates of the other experts sum to 1, so with a factor of 1, the
    /// module's output is about twice as large as the base's.
    #[serde(default = "one")]
    pub residual_scale: f64,
    /// Example prompts for the shared expert. With them and [`RouterInit::States`], a token's gate for it is the
    /// sigmoid of the product of its activations with the direction of the prompts; without them, the gate is constant.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub positive_prompts: Vec<String>,
    /// Counterexamples: prompts that are not for the shared expert.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub negative_prompts: Vec<String>,
}

fn one() -> f64 {
    1.0
}

fn is_false(value: &bool) -> bool {
    !value
}

pub(crate) fn mlp() -> Vec<MixModule> {
    vec![MixModule::Mlp]
}

fn is_mlp(modules: &[MixModule]) -> bool {
    modules == [MixModule::Mlp]
}

fn is_full(storage: &ExpertStorage) -> bool {
    !storage.is_delta()
}

/// Architecture of a mixture of models, which determines tensor names and the keys of config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixArchitecture {
    /// `MixtralForCausalLM`: MLPs of all layers, with one router each.
    Mixtral,
    /// `Qwen2MoeForCausalLM`: MLPs with one router each, and a shared expert.
    Qwen2Moe,
    /// The format of moetify, the paper's tool (arXiv:2408.17280), for everything else.
    Moetify,
}

impl MixArchitecture {
    /// The name in the configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            MixArchitecture::Mixtral => "mixtral",
            MixArchitecture::Qwen2Moe => "qwen2_moe",
            MixArchitecture::Moetify => "moetify",
        }
    }
}

/// A module of a layer that is replaced by experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixModule {
    /// The whole MLP: one router, which reads the MLP's input.
    Mlp,
    /// `gate_proj`, `up_proj` and `down_proj`, each with a router that reads its own input.
    MlpFg,
    /// `q_proj`.
    QProj,
    /// `k_proj`.
    KProj,
    /// `v_proj`.
    VProj,
    /// `o_proj`, which reads the output of attention.
    OProj,
}

impl MixModule {
    /// The attention projection that this module is, if it is one.
    pub(crate) fn attention(self) -> Option<&'static str> {
        match self {
            MixModule::Mlp | MixModule::MlpFg => None,
            MixModule::QProj => Some("q_proj"),
            MixModule::KProj => Some("k_proj"),
            MixModule::VProj => Some("v_proj"),
            MixModule::OProj => Some("o_proj"),
        }
    }
}

/// Initialization of routers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// The kind of initialization.
    pub init: RouterInit,
    /// Random seed for `random`.
    pub seed: u64,
    /// File for `states`: tensors `layers.N`, `(experts, hidden)` in f32, as `cl moe states` writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub states: Option<PathBuf>,
    /// How `cl moe states` reduces a prompt to one vector per layer; defaults to [`Pooling::Last`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<Pooling>,
}

/// Reduction of a prompt's hidden states to one vector per layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Hidden state of the last token, like mergekit-moe's `hidden`.
    #[default]
    Last,
    /// Mean over all tokens, like the paper's tool and mergekit-moe's `hidden_avg`.
    Mean,
    /// Mean of the token embeddings, for all layers, like mergekit-moe's `cheap_embed`.
    Embeddings,
}

impl Default for RouterConfig {
    /// Random, with the seed of the paper's tool.
    fn default() -> Self {
        RouterConfig { init: RouterInit::Random, seed: 1399, states: None, pooling: None }
    }
}

/// Initialization of router weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterInit {
    /// Normal with mean 0 and standard deviation 0.02.
    Random,
    /// The first expert's row is 1, all others are 1e-6: if the sum of a token's activations is positive, the first
    /// expert is its first choice.
    Base,
    /// All weights are 0: all experts are equally likely, and tokens use the first ones.
    Uniform,
    /// Each expert's row is the direction of the hidden states of its example prompts, read from a file.
    States,
    /// Each expert's row is the leading right singular vector of its update; this needs no data.
    TaskVectors,
}

/// One expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertConfig {
    /// Model directory from which its modules are taken.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Example prompts for this expert.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub positive_prompts: Vec<String>,
    /// Counterexamples: prompts that are not for this expert.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub negative_prompts: Vec<String>,
}

/// A floating-point dtype of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 32 bits (IEEE single precision).
    #[serde(alias = "f32")]
    Float32,
    /// 16 bits, of which 10 are mantissa.
    #[serde(alias = "f16")]
    Float16,
    /// 16 bits, of which 7 are mantissa.
    #[serde(alias = "bf16")]
    Bfloat16,
}

impl FloatType {
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            FloatType::Float32 => Dtype::F32,
            FloatType::Float16 => Dtype::F16,
            FloatType::Bfloat16 => Dtype::BF16,
        }
    }

    pub(crate) fn of(dtype: Dtype) -> Option<FloatType> {
        match dtype {
            Dtype::F32 => Some(FloatType::Float32),
            Dtype::F16 => Some(FloatType::Float16),
            Dtype::BF16 => Some(FloatType::Bfloat16),
            _ => None,
        }
    }

    /// The name in config.json.
    pub(crate) fn name(self) -> &'static str {
        match self {
            FloatType::Float32 => "float32",
            FloatType::Float16 => "float16",
            FloatType::Bfloat16 => "bfloat16",
        }
    }
}

impl MixConfig {
    /// Whether the gate of the shared expert depends on the token: it has prompts, and routers are initialized from
    /// hidden states.
    pub fn has_gated_shared_expert(&self) -> bool {
        let has_prompts = self.shared_expert.as_ref().is_some_and(|shared| !shared.positive_prompts.is_empty());
        has_prompts && self.router.init == RouterInit::States
    }

    /// Number of experts that are selected for each token, not counting the shared one.
    pub fn top_k(&self) -> usize {
        let experts = self.experts.len();
        self.num_experts_per_tok.unwrap_or(if self.gateless { experts } else { experts.min(2) })
    }

    /// Architecture of the output. If the key is not set, this is an architecture that Transformers loads if one
    /// supports the mixture: Mixtral, or Qwen2-MoE with a shared expert.
    pub fn architecture(&self) -> MixArchitecture {
        let whole = is_mlp(&self.modules) && is_full(&self.expert_storage) && !self.gateless && !self.global_router;
        self.architecture.unwrap_or(match (whole, &self.shared_expert, &self.layers) {
            (true, Some(_), _) => MixArchitecture::Qwen2Moe,
            (true, None, None) => MixArchitecture::Mixtral,
            _ => MixArchitecture::Moetify,
        })
    }

    /// The configuration with defaults filled in that depend on other keys.
    pub(crate) fn resolved(&self) -> MixConfig {
        let (architecture, top_k) = (Some(self.architecture()), Some(self.top_k()));
        MixConfig { architecture, num_experts_per_tok: top_k, ..self.clone() }
    }
}
/// Returns the name of an expert: the last component of the path of its adapter or model that is not `adapter` or
/// `model`, which are the names that rounds use; or the name of its repository, if it is from the Hub.
///
/// ```
/// assert_eq!(cl_moe::expert_name("runs/math/model".as_ref()), "math");
/// assert_eq!(cl_moe::expert_name("models/code".as_ref()), "code");
/// ```
pub fn expert_name(source: &Path) -> String {
    if let Some(snapshot) = HubSnapshot::of(source) {
        return snapshot.repo.rsplit('/').next().unwrap_or_default().to_owned();
    }
    let parts = source.components().map(|c| c.as_os_str().to_string_lossy().into_owned());
    let parts: Vec<String> = parts.collect();
    let own = parts.iter().rfind(|part| !["adapter", "model", "."].contains(&part.as_str())).or(parts.last());
    own.cloned().unwrap_or_default()
}
