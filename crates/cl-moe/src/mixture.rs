//! Mixtures of LoRA adapters on disk: directories with `mixture_config.json` and `mixture_model.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_TOKENIZER, read_file};
use cl_checkpoint::{Dtype, Manifest, SafetensorsFile, TensorInfo, TensorSource, hash_file};
use serde::{Deserialize, Serialize};

use crate::problem::{MOST_EXPERTS, MixtureProblem, VERSION};
use crate::{Error, FloatType};

/// Name of the configuration file in a mixture's directory.
pub(crate) const CONFIG: &str = "mixture_config.json";
/// Name of the file with the tensors.
pub(crate) const WEIGHTS: &str = "mixture_model.safetensors";
/// Content of `mixture_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// Version of the format, 1.
    pub format_version: u32,
    /// Path or name of the base model when the mixture was written.
    pub base_model_name_or_path: String,
    /// Content hash of the base model, hexadecimal.
    pub base_model_blake3: String,
    /// Number of experts that are selected for each token.
    pub num_experts_per_tok: usize,
    /// How logits are computed.
    pub router_logits: RouterLogits,
    /// How gates are computed from the selected logits.
    pub router_norm: RouterNorm,
    /// The experts, in the order in which they are stacked in the tensors.
    pub experts: Vec<MixtureExpert>,
    /// Ranks and scalings of the experts for each module of the base, by the module's name.
    pub modules: BTreeMap<String, ModuleExperts>,
}

/// How the logits of a module's experts are computed, in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterLogits {
    /// `router·x`: a linear router.
    Linear,
    /// `|router·x|`: the absolute value of a linear router's logit.
    Absolute,
    /// `‖ΔWₑ·x‖ = |sₑ|·‖Aₑ·x‖`, where the columns of `Bₑ` are orthonormal; there is no router weight.
    UpdateNorm,
}

/// How gates are computed from the selected logits `v`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterNorm {
    /// `1 / (1 + exp(-v))` for each logit.
    Sigmoid,
    /// `exp(v) / Σ exp(v)`.
    Softmax,
    /// `v / (Σ v + 1e-6)`.
    Sum,
}

/// One expert of a mixture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureExpert {
    /// Name of the expert.
    pub name: String,
    /// Path or name of its adapter when the mixture was written.
    pub adapter: String,
    /// Content hash of the adapter, hexadecimal.
    pub blake3: String,
}

/// Ranks and scalings of one module, one of each per expert; both are 0 for an expert that does not change this module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleExperts {
    /// Rank of each expert's update.
    pub ranks: Vec<usize>,
    /// Scaling of each expert's update.
    pub scalings: Vec<f64>,
}

impl ModuleExperts {
    /// Number of rows of the stacked A and of columns of the stacked B.
    pub fn total_rank(&self) -> usize {
        self.ranks.iter().sum()
    }
}

/// Names of a module's tensors: A `[Σr, in]`, B `[out, Σr]` and router `[experts, in]`.
pub fn mixture_tensors(module: &str) -> [String; 3] {
    ["lora_A", "lora_B", "lora_router"].map(|part| format!("{module}.{part}.weight"))
}

/// A mixture's directory, opened lazily.
pub struct Mixture {
    dir: PathBuf,
    config: MixtureConfig,
    file: SafetensorsFile,
}

impl Mixture {
    /// Whether a directory contains a mixture of adapters.
    pub fn is_mixture(dir: &Path) -> bool {
        dir.join(CONFIG).is_file()
    }

    /// Opens a directory and checks that its tensors are those that the configuration implies.
    ///
    /// # Errors
    /// Returns [`Error::Mixture`] if the contents are inconsistent, and [`Error::Checkpoint`] if a file cannot be read.
    pub fn open(dir: &Path) -> Result<Mixture, Error> {
        let wrong = |problem| Error::Mixture { path: dir.to_owned(), problem };
        let text = read_file(&dir.join(CONFIG), MAX_TOKENIZER)?;
        let config: MixtureConfig =
            serde_json::from_slice(&text).map_err(|source| wrong(MixtureProblem::Config { source }))?;
        if let Some(problem) = config.problem() {
            return Err(wrong(problem));
        }
        let file = SafetensorsFile::open(&dir.join(WEIGHTS))?;
        if let Some(problem) = tensor_problem(&config, &file) {
            return Err(wrong(problem));
        }
        Ok(Mixture { dir: dir.to_owned(), config, file })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Content of `mixture_config.json`.
    pub fn config(&self) -> &MixtureConfig {
        &self.config
    }

    /// Returns the input and output width of a module; `None` if the mixture does not have the module.
    pub fn widths(&self, module: &str) -> Option<(usize, usize)> {
        let [a, b, _] = mixture_tensors(module);
        Some((self.file.info(&a)?.shape[1], self.file.info(&b)?.shape[0]))
    }

    /// Returns a blake3 hash of tensors and configuration.
    ///
    /// # Errors
    /// Returns [`Error::Checkpoint`] if a file cannot be read.
    pub fn content_hash(&self) -> Result<String, Error> {
        let mut manifest = Manifest::new("mixture");
        for name in [CONFIG, WEIGHTS] {
            manifest.files.insert(name.to_owned(), hash_file(&self.dir.join(name))?);
        }
        Ok(manifest.content_hash())
    }
}

impl TensorSource for Mixture {
    fn names(&self) -> Vec<&str> {
        self.file.names()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.file.info(name)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], cl_checkpoint::Error> {
        self.file.bytes(name)
    }
}

impl MixtureConfig {
    fn problem(&self) -> Option<MixtureProblem> {
        let (experts, k) = (self.experts.len(), self.num_experts_per_tok);
        if self.format_version != VERSION {
            return Some(MixtureProblem::Version { found: self.format_version });
        }
        if experts == 0 || experts > MOST_EXPERTS || k == 0 || k > experts {
            return Some(MixtureProblem::Experts { chosen: k, experts });
        }
        if self.modules.is_empty() {
            return Some(MixtureProblem::NoModules);
        }
        self.modules.iter().find_map(|(name, module)| {
            let fits = module.ranks.len() == experts && module.scalings.len() == experts;
            let sound = module.total_rank() > 0 && module.scalings.iter().all(|s| s.is_finite());
            (!fits || !sound).then(|| MixtureProblem::Module { module: name.clone() })
        })
    }
}

/// Finds a tensor that is missing, unexpected, or of another shape or dtype than the configuration implies.
fn tensor_problem(config: &MixtureConfig, file: &SafetensorsFile) -> Option<MixtureProblem> {
    let mut expected = 0;
    for (name, module) in &config.modules {
        let [a, b, router] = mixture_tensors(name);
        let shape = |name: &str| file.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let (rank, input) = (module.total_rank(), shape(&a).get(1).copied().unwrap_or(0));
        let mut tensors = vec![(&a, vec![rank, input]), (&b, vec![shape(&b).first().copied().unwrap_or(0), rank])];
        if config.router_logits != RouterLogits::UpdateNorm {
            tensors.push((&router, vec![config.experts.len(), input]));
        }
        expected += tensors.len();
        for (name, shape) in tensors {
            let tensor = || name.clone();
            let Some(info) = file.info(name) else { return Some(MixtureProblem::NoTensor { tensor: tensor() }) };
            if info.shape != shape || FloatType::of(info.dtype).is_none() {
                let (dtype, found) = (info.dtype, info.shape.clone());
                return Some(MixtureProblem::Tensor { tensor: tensor(), dtype, shape: found, expected: shape });
            }
            if *name == router && info.dtype != Dtype::F32 {
                return Some(MixtureProblem::RouterDtype { tensor: tensor(), dtype: info.dtype });
            }
        }
    }
    let names = file.names();
    (names.len() != expected).then_some(MixtureProblem::TensorCount { found: names.len(), expected })
}
