//! Checkpoints of a round in progress: trained tensors, both moments, the step. A directory that is replaced
//! atomically.

use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_checkpoint::{
    CheckpointWriter, Dtype, Manifest, ManifestProblem, SafetensorsFile, TensorSource, TensorSpec, WriteOptions,
};
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{Products, load_tensor, products, tensor_bytes, use_products};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adamw::Optimizer;
use crate::problem::StateProblem;
use crate::validation::ValidationState;
use crate::{Keep, Plan, Ranks, TrainConfig, TrainError};

/// Progress of a run. Data order and dropout follow from the seed and the step, so nothing else is saved; the other
/// fields identify the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Steps taken.
    pub(crate) step: u64,
    /// Random seed of the run.
    pub(crate) seed: u64,
    /// Plan of its steps.
    pub(crate) plan: Plan,
    /// Hash of its data.
    pub(crate) data: String,
    /// The library that computes its f32 products on a CPU, by [`Products::name`]; before this was recorded, libtorch's.
    #[serde(default = "libtorch")]
    pub(crate) products: String,
    /// Hash of the earlier adapters that it stays orthogonal to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) orthogonality: Option<String>,
    /// Validation so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) validation: Option<ValidationState>,
}

fn libtorch() -> String {
    Products::Libtorch.name().to_owned()
}

/// Continues with the library that computed the run's products so far, so that the results are those of an
/// uninterrupted run.
///
/// On the same machine this has no effect. On another machine it keeps the library if available; the last bits can
/// still differ, since libraries choose instructions by the processor.
fn keep_products(state: &mut State) {
    let all = [Products::Libtorch, Products::Onednn];
    if !all.into_iter().any(|p| p.name() == state.products && use_products(p)) {
        let here = products().name();
        tracing::warn!(
            "this libtorch has no {}: continuing with {here}; results will differ in their last bits",
            state.products
        );
        state.products = here.to_owned();
    }
}

const PARTS: [&str; 3] = ["param", "exp_avg", "exp_avg_sq"];

/// Name of a tensor of the best weights so far.
fn best_name(name: &str) -> String {
    format!("best.{name}")
}

/// Saves a checkpoint: the whole tensors, however they are divided among the ranks. All ranks call this; rank 0 writes. `best`
/// are this rank's parts of the weights with the lowest validation loss, if they are kept.
pub(crate) fn save(
    dir: &Path,
    optimizer: &Optimizer,
    best: Option<&[Tensor]>,
    config: &TrainConfig,
    state: &State,
    ranks: &Ranks,
) -> Result<(), TrainError> {
    let mut tensors: Vec<(String, usize, &Tensor)> = Vec::new();
    for (part, list) in PARTS.iter().zip([&optimizer.own, &optimizer.exp_avg, &optimizer.exp_avg_sq]) {
        let names = optimizer.names.iter().zip(list).enumerate();
        tensors.extend(names.map(|(place, (n, t))| (format!("{part}.{n}"), place, t)));
    }
    let names = optimizer.names.iter().zip(best.into_iter().flatten()).enumerate();
    tensors.extend(names.map(|(place, (n, t))| (best_name(n), place, t)));
    let spec = |(name, place, t): &(String, usize, &Tensor)| {
        let shape = optimizer.params[*place].size().iter().map(|&d| d as usize).collect();
        TensorSpec { name: name.clone(), dtype: dtype(t), shape }
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let options = WriteOptions { overwrite: true, max_shard_size: u64::MAX };
    let writer = ranks.is_first().then(|| CheckpointWriter::create(dir, &specs, options)).transpose()?;
    for (name, place, own) in &tensors {
        let whole = optimizer.whole(*place, own)?;
        if let Some(writer) = &writer {
            writer.write(name, &tensor_bytes(&whole, whole.kind()))?;
        }
    }
    let Some(writer) = writer else { return Ok(()) };
    let json = |v: serde_json::Result<Value>| v.expect("plain structs are JSON");
    writer.put_json("state.json", &json(serde_json::to_value(state)))?;
    writer.put_json("train_config.json", &json(serde_json::to_value(config)))?;
    writer.finish(Manifest::new("train_state"))?;
    Ok(())
}

/// Loads a saved state into the optimizer, if there is one, and returns the progress and this rank's parts of the best weights;
/// otherwise returns `fresh`. Rank 0 reads, the others take over what it has read.
pub(crate) fn resume(
    dir: &Path,
    optimizer: &mut Optimizer,
    config: &TrainConfig,
    fresh: State,
    ranks: &Ranks,
) -> Result<(State, Option<Vec<Tensor>>), TrainError> {
    let json = |state: &State| serde_json::to_string(state).expect("a plain struct is JSON");
    // Ranks on machines with other processors may compute products with another library.
    let identity = State { products: String::new(), ..fresh.clone() };
    ranks.check_same("[train]", &serde_json::to_string(config).expect("a plain struct is JSON"))?;
    ranks.check_same("the training data, its order or the random seed", &json(&identity))?;
    let saved = if ranks.is_first() { read(dir, optimizer, config, &fresh)? } else { None };
    let text = ranks.text_from_first(&saved.as_ref().map_or_else(String::new, |(state, _)| json(state)))?;
    if text.is_empty() {
        return Ok((fresh, None));
    }
    let mut state: State = from_json(dir, &text)?;
    keep_products(&mut state);
    let file = saved.map(|(_, file)| file);
    let evaluated = state.validation.as_ref().is_some_and(|v| v.config.keep == Keep::Best && v.report.is_some());
    let _no_graph = tch::no_grad_guard();
    // The whole tensor of this name, in all ranks.
    let whole = |name: &str, like: &Tensor, device: Device| -> Result<Tensor, TrainError> {
        let tensor = match &file {
            Some(file) => load_tensor(file, name, like.kind(), device)?,
            None => Tensor::zeros(like.size(), (like.kind(), device)),
        };
        ranks.copy_from_first(&[&tensor])?;
        Ok(tensor)
    };
    for (part, list) in PARTS.iter().zip([&optimizer.own, &optimizer.exp_avg, &optimizer.exp_avg_sq]) {
        for ((name, param), own) in optimizer.names.iter().zip(&optimizer.params).zip(list) {
            let whole = whole(&format!("{part}.{name}"), param, own.device())?;
            own.detach().copy_(&optimizer.part(&whole));
        }
    }
    if let Some(sharding) = &optimizer.sharding {
        sharding.share_updates()?;
    }
    let best = |(name, param): (&String, &Tensor)| {
        whole(&best_name(name), param, Device::Cpu).map(|whole| optimizer.part(&whole))
    };
    let pairs = optimizer.names.iter().zip(&optimizer.params);
    let best = evaluated.then(|| pairs.map(best).collect::<Result<Vec<Tensor>, TrainError>>()).transpose()?;
    Ok((state, best))
}

/// Opens a saved state, if there is one, and checks that it is of this run and has all tensors.
fn read(
    dir: &Path,
    optimizer: &Optimizer,
    config: &TrainConfig,
    fresh: &State,
) -> Result<Option<(State, SafetensorsFile)>, TrainError> {
    if !dir.join("manifest.json").exists() {
        return Ok(None);
    }
    let misfit = |problem| TrainError::State { path: dir.to_owned(), problem };
    if let Some(problem) = Manifest::verify(dir)?.into_iter().next() {
        let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Err(misfit(match problem {
            ManifestProblem::Missing(path) => StateProblem::Missing { file: name(path) },
            ManifestProblem::Changed(path) => StateProblem::Changed { file: name(path) },
            ManifestProblem::Unlisted(path) => StateProblem::Unlisted { file: name(path) },
        }));
    }
    let state: State = read_json(&dir.join("state.json"))?;
    let saved: TrainConfig = read_json(&dir.join("train_config.json"))?;
    if (TrainConfig { zero_stage: config.zero_stage, ..saved }) != *config {
        return Err(misfit(StateProblem::Config));
    }
    if state.seed != fresh.seed {
        return Err(misfit(StateProblem::Seed { saved: state.seed, seed: fresh.seed }));
    }
    if state.plan != fresh.plan || state.data != fresh.data {
        return Err(misfit(StateProblem::Data));
    }
    if state.orthogonality != fresh.orthogonality {
        return Err(misfit(StateProblem::Earlier));
    }
    let identity = |state: &State| state.validation.as_ref().map(|v| (v.config.clone(), v.data.clone()));
    if identity(&state) != identity(fresh) {
        return Err(misfit(StateProblem::Validation));
    }
    let file = SafetensorsFile::open(&dir.join("model.safetensors"))?;
    let evaluated = state.validation.as_ref().is_some_and(|v| v.config.keep == Keep::Best && v.report.is_some());
    for (name, param) in optimizer.names.iter().zip(&optimizer.params) {
        let shape: Vec<usize> = param.size().iter().map(|&d| d as usize).collect();
        let keys = PARTS.iter().map(|part| format!("{part}.{name}")).chain(evaluated.then(|| best_name(name)));
        for key in keys {
            if file.info(&key).is_none_or(|i| i.shape != shape) {
                return Err(misfit(StateProblem::Tensor { tensor: key, shape }));
            }
        }
    }
    Ok(Some((state, file)))
}

fn dtype(t: &Tensor) -> Dtype {
    match t.kind() {
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        _ => Dtype::F32,
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, TrainError> {
    from_json(path, &read_text(path, MAX_CONFIG)?)
}

fn from_json<T: for<'de> Deserialize<'de>>(path: &Path, text: &str) -> Result<T, TrainError> {
    let state = |source| TrainError::State { path: path.to_owned(), problem: StateProblem::Json { source } };
    serde_json::from_str(text).map_err(state)
}
