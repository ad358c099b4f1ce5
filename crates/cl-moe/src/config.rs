use std::path::{Path, PathBuf};

use cl_checkpoint::{Dtype, HubSnapshot};
use serde::{Deserialize, Serialize};

use crate::ExpertStorage;

/// A mixture as a TOML file describes it.
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
    /// Model directory that everything but the experts is taken from.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub base_model: PathBuf,
    /// Architecture of the output; defaults to [`MixConfig::architecture`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<MixArchitecture>,
    /// Experts that each token goes through; defaults to 2 (to 1 of a single expert), and to all where there is no router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_experts_per_tok: Option<usize>,
    /// What is made of experts; each has a router of its own, and `mlp_fg` three.
    #[serde(default = "mlp", skip_serializing_if = "is_mlp")]
    pub modules: Vec<MixModule>,
    /// Layers that have experts; defaults to all. The others are the base's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Dtype of the output; that of the base's embedding without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<FloatType>,
    /// How experts are stored: `full`, `lowrank:R` or `bitdelta`.
    #[serde(default, skip_serializing_if = "is_full")]
    pub expert_storage: ExpertStorage,
    /// No router: every token goes through all experts, and a module's output is the mean of theirs.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gateless: bool,
    /// One router on the token embeddings, which selects the experts of all modules of all layers.
    #[serde(default, skip_serializing_if = "is_false")]
    pub global_router: bool,
    /// How the routers start.
    #[serde(default)]
    pub router: RouterConfig,
    /// An expert that every token goes through, beside those that are chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_expert: Option<SharedExpert>,
    /// The experts, in their order.
    pub experts: Vec<ExpertConfig>,
}

/// An expert that every token goes through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// Model directory whose modules it takes.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Factor on its output. The gates of the others add up to 1, so that with 1 the module's output is about twice as large as
    /// the base's.
    #[serde(default = "one")]
    pub residual_scale: f64,
    /// Prompts of the kind that it is for. With them and [`RouterInit::States`], a token's share of it is the sigmoid of the product
    /// of its activations with their direction; without them it is constant.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub positive_prompts: Vec<String>,
    /// Prompts of the kind that it is not for.
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

/// Architecture of a mixture of models, which decides names of tensors and keys of config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixArchitecture {
    /// `MixtralForCausalLM`: MLPs of all layers, a router each.
    Mixtral,
    /// `Qwen2MoeForCausalLM`: MLPs, a router each, and a shared expert.
    Qwen2Moe,
    /// The format of moetify, the paper's tool (arXiv:2408.17280): everything else.
    Moetify,
}

impl MixArchitecture {
    /// As the configuration names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            MixArchitecture::Mixtral => "mixtral",
            MixArchitecture::Qwen2Moe => "qwen2_moe",
            MixArchitecture::Moetify => "moetify",
        }
    }
}

/// A module of a layer that experts take the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixModule {
    /// The MLP as a whole: one router, which reads its input.
    Mlp,
    /// `gate_proj`, `up_proj` and `down_proj`, each with a router that reads its own input.
    MlpFg,
    /// `q_proj`.
    QProj,
    /// `k_proj`.
    KProj,
    /// `v_proj`.
    VProj,
    /// `o_proj`, which reads attention's output.
    OProj,
}

impl MixModule {
    /// The projection of attention that it is.
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

/// How the routers start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// By which rule.
    pub init: RouterInit,
    /// Seed of `random`.
    pub seed: u64,
    /// File of `states`: tensors `layers.N`, `(experts, hidden)` in f32, as `cl moe states` writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub states: Option<PathBuf>,
    /// How `cl moe states` reduces a prompt to one vector per layer; [`Pooling::Last`] without it.
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
    /// Random, with the seed that the paper's tool has.
    fn default() -> Self {
        RouterConfig { init: RouterInit::Random, seed: 1399, states: None, pooling: None }
    }
}

/// The rule that router weights start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterInit {
    /// Normal, with mean 0 and standard deviation 0.02.
    Random,
    /// The first expert's row 1, all others 1e-6: where the sum of a token's activations is positive it goes to the first
    /// expert first.
    Base,
    /// All 0: all experts are equally likely, and a token goes to the first ones.
    Uniform,
    /// Each expert's row is the direction of its example prompts' hidden states, from a file.
    States,
    /// Each expert's row is the leading right singular vector of its update; needs no data.
    TaskVectors,
}

/// One expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertConfig {
    /// Model directory whose modules it takes.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Prompts of the kind that it is for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub positive_prompts: Vec<String>,
    /// Prompts of the kind that it is not for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub negative_prompts: Vec<String>,
}

/// A floating dtype of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 32 bits.
    #[serde(alias = "f32")]
    Float32,
    /// 16 bits, 10 of mantissa.
    #[serde(alias = "f16")]
    Float16,
    /// 16 bits, 7 of mantissa.
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

    /// As config.json names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            FloatType::Float32 => "float32",
            FloatType::Float16 => "float16",
            FloatType::Bfloat16 => "bfloat16",
        }
    }
}

impl MixConfig {
    /// Whether the share of the shared expert depends on the token: it has prompts, and routers start from hidden states.
    pub fn has_gated_shared_expert(&self) -> bool {
        let has_prompts = self.shared_expert.as_ref().is_some_and(|shared| !shared.positive_prompts.is_empty());
        has_prompts && self.router.init == RouterInit::States
    }

    /// Number of experts that each token goes through, the shared one left out.
    pub fn top_k(&self) -> usize {
        let experts = self.experts.len();
        self.num_experts_per_tok.unwrap_or(if self.gateless { experts } else { experts.min(2) })
    }

    /// Architecture of the output. Without the key it is one that Transformers loads, if that can hold the mixture: Mixtral,
    /// or Qwen2-MoE with a shared expert.
    pub fn architecture(&self) -> MixArchitecture {
        let whole = is_mlp(&self.modules) && is_full(&self.expert_storage) && !self.gateless && !self.global_router;
        self.architecture.unwrap_or(match (whole, &self.shared_expert, &self.layers) {
            (true, Some(_), _) => MixArchitecture::Qwen2Moe,
            (true, None, None) => MixArchitecture::Mixtral,
            _ => MixArchitecture::Moetify,
        })
    }

    /// The configuration with defaults that depend on each other filled in.
    pub(crate) fn resolved(&self) -> MixConfig {
        let (architecture, top_k) = (Some(self.architecture()), Some(self.top_k()));
        MixConfig { architecture, num_experts_per_tok: top_k, ..self.clone() }
    }
}
/// What an expert is called: the last part of the path of its adapter or model that is not `adapter` or `model`, which is what
/// rounds call theirs; the name of its repository if it is of the hub.
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
