use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_checkpoint::{HubSnapshot, OutputDir};
use serde::{Deserialize, Serialize, Serializer};

use crate::config::expert_name;
use crate::config_file::from_toml;
use crate::{Error, RouterLogits, RouterNorm};

/// Configuration of a mixture of LoRA adapters, as in a TOML file.
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
    /// Directory of the model on which the adapters were trained.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub base_model: PathBuf,
    /// Number of experts that are selected for each token; defaults to all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_experts_per_tok: Option<usize>,
    /// How routers are initialized and how gates are computed.
    #[serde(default)]
    pub router: BlendRouter,
    /// PEFT adapter directories of general knowledge: the mean of their updates is subtracted from each expert's
    /// update.
    #[serde(default, skip_serializing_if = "Vec::is_empty", serialize_with = "snapshots")]
    pub general_adapters: Vec<PathBuf>,
    /// The experts, in order.
    pub experts: Vec<BlendExpert>,
}

fn snapshots<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| HubSnapshot::source_name(path)))
}

fn snapshot<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(HubSnapshot::source_name).serialize(serializer)
}

/// How the routers of a mixture of adapters are initialized, and how gates are computed from their logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlendRouter {
    /// Initialization of the router weights.
    pub init: BlendInit,
    /// How gates are computed from the selected logits; defaults to `softmax` for `arrow` and `spectr`, otherwise to
    /// `sigmoid`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<RouterNorm>,
    /// Random seed for `random`.
    pub seed: u64,
    /// Divisor of the logits of `arrow`, like PEFT's `router_temperature`; defaults to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
}

impl Default for BlendRouter {
    /// Random weights, seed 1399.
    fn default() -> Self {
        BlendRouter { init: BlendInit::Random, norm: None, seed: 1399, temperature: None }
    }
}

impl BlendRouter {
    /// The norm, or its default.
    pub fn norm(&self) -> RouterNorm {
        self.norm.unwrap_or(match self.init {
            BlendInit::Random | BlendInit::Uniform => RouterNorm::Sigmoid,
            BlendInit::Arrow | BlendInit::Spectr => RouterNorm::Softmax,
        })
    }
}

/// Initialization of the routers of adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlendInit {
    /// Normal with mean 0 and standard deviation 0.02.
    Random,
    /// All weights are 0: every expert's logit is 0, and its gate with `sigmoid` is 1/2.
    Uniform,
    /// An expert's row is the leading right singular vector of its update, and its logit is `|row·x|` (Ostapenko et
    /// al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv:2405.11157).
    Arrow,
    /// An expert's logit is `‖ΔW·x‖`, which uses the whole spectrum of the update; there is no router weight (after
    /// Fleshman and Van Durme, "SpectR: Dynamically Composing LM Experts with Spectral Routing", arXiv:2504.03454).
    Spectr,
}

impl BlendInit {
    /// Returns how logits are computed with this initialization.
    pub fn logits(self) -> RouterLogits {
        match self {
            BlendInit::Random | BlendInit::Uniform => RouterLogits::Linear,
            BlendInit::Arrow => RouterLogits::Absolute,
            BlendInit::Spectr => RouterLogits::UpdateNorm,
        }
    }
}

/// One expert: an adapter, or a model whose difference from the base is approximated by an adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlendExpert {
    /// PEFT adapter directory.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "snapshot")]
    pub adapter: Option<PathBuf>,
    /// Directory of a model fine-tuned from the base, instead of an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "snapshot")]
    pub model: Option<PathBuf>,
    /// Maximum rank of a module's update for `model`: the smallest singular values are truncated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Example prompts for this expert, with which `cl moe route` compares those of a task.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub positive_prompts: Vec<String>,
}

impl BlendExpert {
    /// Creates an expert from an adapter.
    pub fn of_adapter(dir: PathBuf) -> BlendExpert {
        BlendExpert { adapter: Some(dir), ..BlendExpert::default() }
    }

    /// The directory of the adapter or model.
    pub fn source(&self) -> &Path {
        self.adapter.as_deref().or(self.model.as_deref()).unwrap_or(Path::new(""))
    }

    /// Name of the expert; see [`expert_name`].
    pub fn name(&self) -> String {
        expert_name(self.source())
    }
}

impl BlendConfig {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with the line if the file does not parse, and [`Error::Checkpoint`] if it cannot be
    /// read.
    pub fn read(path: &Path) -> Result<BlendConfig, Error> {
        let text = read_text(path, MAX_CONFIG)?;
        from_toml(&text).map_err(|problem| Error::Config { path: path.to_owned(), problem })
    }

    /// Checks the output path, which must not be one of the inputs.
    ///
    /// # Errors
    /// Returns the errors of [`OutputDir::check`].
    pub fn check_output(&self, out: &Path, overwrite: bool) -> Result<(), Error> {
        let mut inputs = vec![("the base model", self.base_model.as_path())];
        inputs.extend(self.experts.iter().map(|e| ("an expert", e.source())));
        inputs.extend(self.general_adapters.iter().map(|dir| ("an adapter", dir.as_path())));
        Ok(OutputDir::check(out, overwrite, &inputs)?)
    }

    /// Number of experts that are selected for each token.
    pub fn top_k(&self) -> usize {
        self.num_experts_per_tok.unwrap_or(self.experts.len())
    }
}
