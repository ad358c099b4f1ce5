use std::path::{Path, PathBuf};

use cl_checkpoint::HubSnapshot;
use cl_checkpoint::files::{MAX_CONFIG, read_text};
use serde::{Deserialize, Serialize};

use crate::config_file::from_toml;
use crate::{Error, RouterLogits, RouterNorm};

/// A mixture of LoRA adapters as a TOML file describes it.
///
/// ```
/// let config: cl_moe::BlendConfig = toml::from_str(
///     r#"
///     base_model = "models/base"
///     router.init = "arrow"
///     [[experts]]
///     adapter = "runs/math/adapter"
///     [[experts]]
///     adapter = "runs/code/adapter"
///     "#,
/// )?;
/// assert_eq!(config.router.norm(), cl_moe::RouterNorm::Softmax);
/// # Ok::<(), toml::de::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlendConfig {
    /// Model directory that the adapters were trained on.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub base_model: PathBuf,
    /// Experts that each token goes through; defaults to all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_experts_per_tok: Option<usize>,
    /// How the routers start and what is made of their logits.
    #[serde(default)]
    pub router: BlendRouter,
    /// The experts, in their order.
    pub experts: Vec<BlendExpert>,
}

/// How the routers of a mixture of adapters start and what is made of their logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlendRouter {
    /// The rule that router weights start from.
    pub init: BlendInit,
    /// Gates from the selected logits; defaults to `softmax` for `arrow` and `spectr`, and to `sigmoid` for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<RouterNorm>,
    /// Seed of `random`.
    pub seed: u64,
}

impl Default for BlendRouter {
    /// Random weights, seed 1399.
    fn default() -> Self {
        BlendRouter { init: BlendInit::Random, norm: None, seed: 1399 }
    }
}

impl BlendRouter {
    /// The norm, its default filled in.
    pub fn norm(&self) -> RouterNorm {
        self.norm.unwrap_or(match self.init {
            BlendInit::Random | BlendInit::Uniform => RouterNorm::Sigmoid,
            BlendInit::Arrow | BlendInit::Spectr => RouterNorm::Softmax,
        })
    }
}

/// The rule that the routers of adapters start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlendInit {
    /// Normal, with mean 0 and standard deviation 0.02.
    Random,
    /// All 0: every expert's logit is 0, its gate 1/2 under `sigmoid`.
    Uniform,
    /// An expert's row is the leading right singular vector of its update, and its logit `|row·x|` (Ostapenko et al., "Towards
    /// Modular LLMs by Building and Reusing a Library of LoRAs", arXiv:2405.11157).
    Arrow,
    /// An expert's logit is `‖ΔW·x‖`, all of the update's spectrum; there is no router weight (after Fleshman and Van Durme,
    /// "SpectR: Dynamically Composing LM Experts with Spectral Routing", arXiv:2504.03454).
    Spectr,
}

impl BlendInit {
    /// How logits are computed under this rule.
    pub fn logits(self) -> RouterLogits {
        match self {
            BlendInit::Random | BlendInit::Uniform => RouterLogits::Linear,
            BlendInit::Arrow => RouterLogits::Absolute,
            BlendInit::Spectr => RouterLogits::UpdateNorm,
        }
    }
}

/// One expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlendExpert {
    /// PEFT adapter directory.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub adapter: PathBuf,
}

impl BlendExpert {
    /// What it is called: the last part of its path that is not `adapter`, which is what rounds call theirs;
    /// the name of its repository if it is of the hub.
    pub fn name(&self) -> String {
        if let Some(snapshot) = HubSnapshot::of(&self.adapter) {
            return snapshot.repo.rsplit('/').next().unwrap_or_default().to_owned();
        }
        let parts = self.adapter.components().map(|c| c.as_os_str().to_string_lossy().into_owned());
        let parts: Vec<String> = parts.collect();
        let own = parts.iter().rfind(|part| *part != "adapter" && *part != ".").or(parts.last());
        own.cloned().unwrap_or_default()
    }
}

impl BlendConfig {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with the place in the file if it does not parse, and [`Error::Checkpoint`] if it cannot be
    /// read.
    pub fn read(path: &Path) -> Result<BlendConfig, Error> {
        let text = read_text(path, MAX_CONFIG)?;
        from_toml(&text).map_err(|problem| Error::Config { path: path.to_owned(), problem })
    }

    /// Number of experts that each token goes through.
    pub fn top_k(&self) -> usize {
        self.num_experts_per_tok.unwrap_or(self.experts.len())
    }
}
