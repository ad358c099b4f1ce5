use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::COMPANIONS;
use crate::error::{mixture_hint, run_hint};
use crate::files::{FileStamp, MAX_CONFIG, check_unchanged, read_file};
use crate::fuse_experts::fuse;
use crate::fused_experts::{Expanded, expand};
use crate::problem::{AdapterProblem, PlanProblem};
use crate::source::byte_len;
use crate::writer::{CheckpointWriter, WriteOptions};
use crate::{
    AdapterConfig, BaseExperts, Checkpoint, Error, HubSnapshot, Manifest, SafetensorsFile, TensorInfo, TensorSource,
    TensorSpec,
};

/// A PEFT adapter directory, opened lazily.
pub struct Adapter {
    dir: PathBuf,
    /// The configuration as stored.
    config: AdapterConfig,
    file: Arc<SafetensorsFile>,
    /// What the adapter is after the expansion of `target_parameters`.
    expanded: Option<Expanded>,
    modules: Vec<AdapterModule>,
    stamps: Vec<(PathBuf, FileStamp)>,
}

/// One adapted layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterModule {
    /// Name of the layer in the base model.
    pub name: String,
    /// Kind of the layer.
    pub kind: LayerKind,
    /// Shape of `lora_A`: `[r, in]`; for an embedding, `[r, tokens]`.
    pub a_shape: Vec<usize>,
    /// Shape of `lora_B`: `[out, r]`.
    pub b_shape: Vec<usize>,
    /// Whether the layer has a magnitude vector (DoRA).
    pub dora: bool,
}

/// Kind of an adapted layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// A linear layer: `ΔW = scaling · B·A`, `[out, in]`.
    Linear,
    /// An embedding: `ΔW = scaling · (B·A)ᵀ`, `[tokens, out]`.
    Embedding,
}

impl LayerKind {
    /// Returns the suffixes of its factors' names.
    pub(crate) fn suffixes(self) -> [&'static str; 2] {
        match self {
            LayerKind::Linear => [".lora_A.weight", ".lora_B.weight"],
            LayerKind::Embedding => [".lora_embedding_A", ".lora_embedding_B"],
        }
    }
}

/// Suffixes of the name of a magnitude, in current PEFT and before 0.10.
const MAGNITUDES: [&str; 2] = [".lora_magnitude_vector", ".lora_magnitude_vector.weight"];

impl AdapterModule {
    /// Returns the rank of its update.
    ///
    /// # Panics
    /// Panics if `a_shape` is empty; the shapes of an [`Adapter`] have two dimensions.
    pub fn rank(&self) -> usize {
        self.a_shape[0]
    }

    /// Returns the names of the tensors A and B.
    pub fn factors(&self) -> [String; 2] {
        self.kind.suffixes().map(|suffix| format!("{PREFIX}{}{suffix}", self.name))
    }

    /// Returns the shape of the layer's weight.
    ///
    /// # Panics
    /// Panics if a shape has fewer than two dimensions; those of an [`Adapter`] have two.
    pub fn weight_shape(&self) -> [usize; 2] {
        match self.kind {
            LayerKind::Linear => [self.b_shape[0], self.a_shape[1]],
            LayerKind::Embedding => [self.a_shape[1], self.b_shape[0]],
        }
    }
}

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
pub(crate) const PREFIX: &str = "base_model.model.";

impl Adapter {
    /// Opens `adapter_config.json` and `adapter_model.safetensors`, and checks that every `lora_A` has a `lora_B` and
    /// that ranks agree with each other and with the config. Factors of PEFT's `target_parameters` for fused experts are
    /// replaced by those of each expert's modules, see [`Adapter::named_for`].
    ///
    /// # Errors
    /// Returns [`Error::NotFound`], [`Error::Json`] or [`Error::Adapter`] if a file is missing or invalid, and an error
    /// if the weight file cannot be read.
    pub fn open(dir: &Path) -> Result<Adapter, Error> {
        let path = dir.join(CONFIG);
        if !path.exists() {
            let named = !dir.exists() && dir.to_str().is_some_and(HubSnapshot::is_name);
            let hub = named.then_some("add --hub to download an adapter of the Hugging Face hub by this name");
            let run = || {
                run_hint(dir, "adapter/adapter_config.json", "this is a run; its adapter is in the directory `adapter`")
            };
            let hint = mixture_hint(dir).or(hub).or_else(run);
            let hint = hint.unwrap_or("an adapter directory contains adapter_config.json");
            return Err(Error::NotFound { path, hint });
        }
        let text = read_file(&path, MAX_CONFIG)?;
        let config: AdapterConfig = serde_json::from_slice(&text).map_err(Error::json(&path))?;
        if let Some(problem) = config.problem() {
            return Err(Error::Adapter { path, problem: Box::new(problem) });
        }
        let path = dir.join(WEIGHTS);
        if !path.exists() {
            let hint = if dir.join("adapter_model.bin").exists() {
                "this adapter has only adapter_model.bin; save it again with safe_serialization=True"
            } else {
                "an adapter directory contains adapter_model.safetensors"
            };
            return Err(Error::NotFound { path, hint });
        }
        let file = Arc::new(SafetensorsFile::open(&path)?);
        let wrong = |problem| Error::Adapter { path: dir.join(CONFIG), problem: Box::new(problem) };
        let expanded = expand(&file, &config, None).map_err(wrong)?;
        let stamps = FileStamp::of_all(vec![dir.join(CONFIG), path])?;
        Adapter { dir: dir.to_owned(), config, file, expanded, modules: Vec::new(), stamps }.with_modules()
    }

    fn with_modules(mut self) -> Result<Adapter, Error> {
        let shapes = self.names().into_iter().filter_map(|n| Some((n, self.info(n)?.shape.as_slice()))).collect();
        self.modules = modules(self.file.path(), &shapes, self.config())?;
        Ok(self)
    }

    /// Returns the adapter with the base's names of experts, if it has others: an adapter of fused experts
    /// (`target_parameters`) does not contain the names of their modules in the base. Those of an opened adapter follow
    /// from `base_model_name_or_path`: Mixtral's if it is the directory of a Mixtral or if its name says so, otherwise
    /// `mlp.experts.0.gate_proj`. `has` tells whether the base has a module.
    pub fn named_for(&self, has: &dyn Fn(&str) -> bool) -> Option<Adapter> {
        let current = self.expanded.as_ref()?;
        if current.witness.as_ref().is_none_or(|module| has(module)) {
            return None;
        }
        let expanded = expand(&self.file, &self.config, Some(current.layout.other())).ok()??;
        if !expanded.witness.as_ref().is_some_and(|module| has(module)) {
            return None;
        }
        let (dir, config, stamps) = (self.dir.clone(), self.config.clone(), self.stamps.clone());
        let (file, modules) = (self.file.clone(), Vec::new());
        Adapter { dir, config, file, expanded: Some(expanded), modules, stamps }.with_modules().ok()
    }

    /// Like [`Adapter::named_for`], for a base in a directory.
    pub fn named_in(&self, base: &Checkpoint) -> Option<Adapter> {
        self.named_for(&|module| base.info(&format!("{module}.weight")).is_some())
    }

    /// Returns the modules of fused experts (`target_parameters`), with the numbers of experts; empty for other adapters,
    /// which do not contain the number of experts of the base.
    pub fn experts(&self) -> BaseExperts {
        self.expanded.as_ref().map(|expanded| expanded.experts.clone()).unwrap_or_default()
    }

    /// Returns the path of the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns its files, with their stamps from when it was opened.
    pub fn stamps(&self) -> &[(PathBuf, FileStamp)] {
        &self.stamps
    }

    /// Checks that neither file has changed since the adapter was opened.
    ///
    /// # Errors
    /// Returns [`Error::Changed`] for a file that has changed.
    pub fn check_unchanged(&self) -> Result<(), Error> {
        check_unchanged(&self.stamps)
    }

    /// Returns the tokenizer and template files in the adapter's directory, which training with added tokens saves
    /// there.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn tokenizer_files(&self) -> Result<Vec<PathBuf>, Error> {
        let of_model = ["generation_config.json", "LICENSE"];
        let names = COMPANIONS.iter().filter(|name| !of_model.contains(name));
        Ok(names.map(|name| self.dir.join(name)).filter(|path| path.is_file()).collect())
    }

    /// Returns the content of `adapter_config.json`. Instead of `target_parameters`, it has the modules, ranks and
    /// scalings of the experts.
    pub fn config(&self) -> &AdapterConfig {
        self.expanded.as_ref().map_or(&self.config, |expanded| &expanded.config)
    }

    /// Returns the adapted layers, sorted by name.
    pub fn modules(&self) -> Vec<&AdapterModule> {
        self.modules.iter().collect()
    }

    /// Returns the name of a module's magnitude tensor, of shape `[out]`, if it has one (DoRA).
    pub fn magnitude(&self, module: &AdapterModule) -> Option<String> {
        let names = MAGNITUDES.map(|suffix| format!("{PREFIX}{}{suffix}", module.name));
        names.into_iter().find(|name| module.dora && self.info(name).is_some())
    }

    /// Returns the tensors that are neither factors nor magnitudes, each with the name of the corresponding tensor of
    /// the base: PEFT stores the weight of an adapted embedding or head together with its adapter.
    pub fn whole_tensors(&self) -> Vec<(&str, String)> {
        let factor = |name: &str| {
            let kinds = [LayerKind::Linear, LayerKind::Embedding];
            kinds.iter().flat_map(|k| k.suffixes()).chain(MAGNITUDES).any(|suffix| name.ends_with(suffix))
        };
        let whole = self.names().into_iter().filter(|name| !factor(name));
        whole.map(|name| (name, name.strip_prefix(PREFIX).unwrap_or(name).replace(".base_layer.", "."))).collect()
    }

    /// Checks that the adapter is of a supported kind: LoRA with only factors, DoRA magnitudes and [additional
    /// tensors](Adapter::beside).
    ///
    /// # Errors
    /// Returns [`Error::Adapter`] with the name of the unsupported feature.
    pub fn check_built(&self) -> Result<(), Error> {
        let Some(feature) = self.config().not_built() else { return Ok(()) };
        Err(Error::Adapter { path: self.dir.clone(), problem: Box::new(AdapterProblem::Unsupported { feature }) })
    }
}

fn modules(
    path: &Path,
    shapes: &BTreeMap<&str, &[usize]>,
    config: &AdapterConfig,
) -> Result<Vec<AdapterModule>, Error> {
    let wrong = |problem| Error::Adapter { path: path.to_owned(), problem: Box::new(problem) };
    let mut modules = Vec::new();
    if config.peft_type != "LORA" {
        return Ok(modules);
    }
    for &name in shapes.keys() {
        let found = [LayerKind::Linear, LayerKind::Embedding].into_iter().find_map(|kind| {
            let [a, b] = kind.suffixes();
            name.strip_suffix(a).map(|module| (kind, module, true)).or(name.strip_suffix(b).map(|m| (kind, m, false)))
        });
        let Some((kind, module, is_a)) = found else { continue };
        let [a, b] = kind.suffixes().map(|suffix| shapes.get(format!("{module}{suffix}").as_str()).map(|s| s.to_vec()));
        let (Some(a), Some(b)) = (a, b) else {
            return Err(wrong(AdapterProblem::NoCounterpart { tensor: name.to_owned() }));
        };
        if !is_a {
            continue;
        }
        let Some(module) = module.strip_prefix(PREFIX) else {
            return Err(wrong(AdapterProblem::Prefix { tensor: name.to_owned(), prefix: PREFIX }));
        };
        let rank = config.rank(module);
        if a.len() != 2 || b.len() != 2 || a[0] != rank || b[1] != rank {
            return Err(wrong(AdapterProblem::Rank { module: module.to_owned(), rank, a, b }));
        }
        let dora = magnitude(module, shapes, config, &b).map_err(wrong)?;
        modules.push(AdapterModule { name: module.to_owned(), kind, a_shape: a, b_shape: b, dora });
    }
    if modules.is_empty() {
        return Err(wrong(AdapterProblem::NoFactors));
    }
    Ok(modules)
}

/// Whether a module has a magnitude. This is required if `use_dora` is set, and an error otherwise.
fn magnitude(
    module: &str,
    shapes: &BTreeMap<&str, &[usize]>,
    config: &AdapterConfig,
    b_shape: &[usize],
) -> Result<bool, AdapterProblem> {
    let name = || module.to_owned();
    let shape = MAGNITUDES.iter().find_map(|suffix| shapes.get(format!("{PREFIX}{module}{suffix}").as_str()));
    match shape {
        None if config.use_dora => Err(AdapterProblem::NoMagnitude { module: name() }),
        None => Ok(false),
        Some(_) if !config.use_dora => Err(AdapterProblem::Magnitude { module: name() }),
        Some(shape) if shape.iter().product::<usize>() != b_shape[0] => {
            Err(AdapterProblem::MagnitudeShape { module: name(), expected: b_shape[0], shape: shape.to_vec() })
        }
        Some(_) => Ok(true),
    }
}

impl TensorSource for Adapter {
    fn names(&self) -> Vec<&str> {
        self.expanded.as_ref().map_or_else(|| self.file.names(), Expanded::names)
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.expanded.as_ref().map_or_else(|| self.file.info(name), |expanded| expanded.info(name))
    }

    fn bytes(&self, name: &str) -> Result<&[u8], Error> {
        self.expanded.as_ref().map_or_else(|| self.file.bytes(name), |expanded| expanded.bytes(&self.file, name))
    }
}

/// Writes a PEFT adapter directory atomically, with the tensors and the configuration as they are.
///
/// # Errors
/// Returns [`Error::Adapter`] if tensors contradict the config, as [`Adapter::open`] does, [`Error::Plan`] if a tensor
/// has another number of bytes than its shape or a name occurs twice, and the errors of [`CheckpointWriter`].
pub fn write_adapter(
    dir: &Path,
    config: &AdapterConfig,
    tensors: &[(TensorSpec, Vec<u8>)],
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), Error> {
    check(dir, config, tensors)?;
    let tensors: Vec<_> = tensors.iter().map(|(spec, bytes)| (spec, bytes.as_slice())).collect();
    write(dir, config, &tensors, &BTreeMap::new(), &[], manifest, overwrite)
}

/// Like [`write_adapter`], with additional files such as a model card, given as pairs of name and content. `experts` are
/// those of the base: if PEFT would misread the factors of experts when it loads them into a model of Transformers 5,
/// they are written with `target_parameters`. [`Adapter::open`] then returns the same modules, with the same factors up
/// to the scalings of projections that differ.
///
/// # Errors
/// Returns the same errors as [`write_adapter`].
pub fn write_adapter_with_files(
    dir: &Path,
    config: &AdapterConfig,
    tensors: &[(TensorSpec, Vec<u8>)],
    files: &[(&str, &[u8])],
    experts: &BaseExperts,
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), Error> {
    check(dir, config, tensors)?;
    let Some(fused) = fuse(config, tensors, experts) else {
        let tensors: Vec<_> = tensors.iter().map(|(spec, bytes)| (spec, bytes.as_slice())).collect();
        return write(dir, config, &tensors, &BTreeMap::new(), files, manifest, overwrite);
    };
    let tensors: Vec<_> = fused.tensors.iter().map(|(spec, bytes)| (spec, bytes.as_ref())).collect();
    write(dir, &fused.config, &tensors, &fused.metadata, files, manifest, overwrite)
}

fn check(dir: &Path, config: &AdapterConfig, tensors: &[(TensorSpec, Vec<u8>)]) -> Result<(), Error> {
    if let Some(problem) = config.problem() {
        return Err(Error::Adapter { path: dir.join(CONFIG), problem: Box::new(problem) });
    }
    check_sizes(tensors).map_err(|problem| Error::Plan { path: dir.to_owned(), problem: Box::new(problem) })?;
    let shapes = tensors.iter().map(|(spec, _)| (spec.name.as_str(), spec.shape.as_slice())).collect();
    modules(&dir.join(WEIGHTS), &shapes, config).map(drop)
}

/// Checks that names are unique and that every tensor has the bytes of its shape.
fn check_sizes(tensors: &[(TensorSpec, Vec<u8>)]) -> Result<(), PlanProblem> {
    let mut names = BTreeSet::new();
    for (TensorSpec { name, dtype, shape }, bytes) in tensors {
        let tensor = || name.clone();
        if !names.insert(name) {
            return Err(PlanProblem::TensorName { tensor: tensor() });
        }
        let Some(planned) = byte_len(*dtype, shape) else {
            return Err(PlanProblem::TooLarge { tensor: tensor(), shape: shape.clone() });
        };
        if planned != bytes.len() {
            return Err(PlanProblem::Size { tensor: tensor(), planned, found: bytes.len() });
        }
    }
    Ok(())
}

fn write(
    dir: &Path,
    config: &AdapterConfig,
    tensors: &[(&TensorSpec, &[u8])],
    metadata: &BTreeMap<String, String>,
    files: &[(&str, &[u8])],
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), Error> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| (*spec).clone()).collect();
    let options = WriteOptions { max_shard_size: u64::MAX, overwrite };
    let writer = CheckpointWriter::create_named(dir, &specs, options, "adapter_model", metadata)?;
    for (spec, bytes) in tensors {
        writer.write(&spec.name, bytes)?;
    }
    let json = serde_json::to_value(config).map_err(Error::json(&dir.join(CONFIG)))?;
    writer.put_json(CONFIG, &json)?;
    for (name, content) in files {
        writer.put_file(name, content)?;
    }
    writer.finish(manifest)
}
