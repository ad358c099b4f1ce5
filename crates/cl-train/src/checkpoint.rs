//! Checkpoints of a round in progress: trained tensors, both moments, the step. A directory that is replaced
//! atomically.

use std::path::Path;

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_checkpoint::{
    CheckpointWriter, Dtype, Manifest, ManifestProblem, SafetensorsFile, TensorSource, TensorSpec, WriteOptions,
};
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{Products, load_tensor, products, tensor_bytes, use_products};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adamw::Optimizer;
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

/// Goes on with the library that computed the run's products so far, so that the results are those of an uninterrupted run.
///
/// On the same machine this changes nothing. On another one it keeps the library where that has it; the last bits may differ all
/// the same, since libraries choose instructions by the processor.
fn keep_products(state: &mut State) {
    let all = [Products::Libtorch, Products::Onednn];
    if !all.into_iter().any(|p| p.name() == state.products && use_products(p)) {
        let here = products().name();
        tracing::warn!("this libtorch has no {}: products go on with {here}, and last bits differ", state.products);
        state.products = here.to_owned();
    }
}

const PARTS: [&str; 3] = ["param", "exp_avg", "exp_avg_sq"];

/// Name of a tensor of the best weights so far.
fn best_name(name: &str) -> String {
    format!("best.{name}")
}

/// Saves a checkpoint. `best` are the weights with the lowest validation loss, if they are kept.
pub(crate) fn save(
    dir: &Path,
    optimizer: &Optimizer,
    best: Option<&[Tensor]>,
    config: &TrainConfig,
    state: &State,
) -> Result<(), TrainError> {
    let mut tensors: Vec<(String, &Tensor)> = Vec::new();
    for (part, list) in PARTS.iter().zip([&optimizer.params, &optimizer.exp_avg, &optimizer.exp_avg_sq]) {
        tensors.extend(optimizer.names.iter().zip(list).map(|(n, t)| (format!("{part}.{n}"), t)));
    }
    tensors.extend(optimizer.names.iter().zip(best.into_iter().flatten()).map(|(n, t)| (best_name(n), t)));
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, t)| TensorSpec {
            name: name.clone(),
            dtype: dtype(t),
            shape: t.size().iter().map(|&d| d as usize).collect(),
        })
        .collect();
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions { overwrite: true, max_shard_size: u64::MAX })?;
    for (name, t) in &tensors {
        writer.write(name, &tensor_bytes(t, t.kind()))?;
    }
    let json = |v: serde_json::Result<Value>| v.expect("plain structs are JSON");
    writer.put_json("state.json", &json(serde_json::to_value(state)))?;
    writer.put_json("train_config.json", &json(serde_json::to_value(config)))?;
    writer.finish(Manifest::new("train_state"))?;
    Ok(())
}

/// As [`resume`] in rank 0; the other ranks take over its progress, and have no best weights.
pub(crate) fn resume_all(
    dir: &Path,
    optimizer: &mut Optimizer,
    config: &TrainConfig,
    fresh: State,
    ranks: &Ranks,
) -> Result<(State, Option<Vec<Tensor>>), TrainError> {
    if ranks.world_size() == 1 {
        return resume(dir, optimizer, config, fresh);
    }
    let json = |state: &State| serde_json::to_string(state).expect("a plain struct is JSON");
    // Ranks on machines with other processors may compute products with another library.
    let identity = State { products: String::new(), ..fresh.clone() };
    ranks.check_same("[train]", &serde_json::to_string(config).expect("a plain struct is JSON"))?;
    ranks.check_same("the training data, its order or the random seed", &json(&identity))?;
    let (state, best) = if ranks.is_first() { resume(dir, optimizer, config, fresh)? } else { (fresh, None) };
    let text = ranks.text_from_first(&json(&state))?;
    let mut state: State =
        serde_json::from_str(&text).map_err(|e| TrainError::State { path: dir.to_owned(), message: e.to_string() })?;
    if state.step > 0 {
        keep_products(&mut state);
        let all = [&optimizer.params, &optimizer.exp_avg, &optimizer.exp_avg_sq];
        ranks.from_first(&all.into_iter().flatten().collect::<Vec<_>>())?;
    }
    Ok((state, best))
}

/// Loads a saved state into the optimizer, if there is one, and returns the progress and the best weights; otherwise
/// returns `fresh`.
pub(crate) fn resume(
    dir: &Path,
    optimizer: &mut Optimizer,
    config: &TrainConfig,
    fresh: State,
) -> Result<(State, Option<Vec<Tensor>>), TrainError> {
    if !dir.join("manifest.json").exists() {
        return Ok((fresh, None));
    }
    let misfit = |message: String| TrainError::State { path: dir.to_owned(), message };
    if let Some(problem) = Manifest::verify(dir)?.into_iter().next() {
        let (path, what) = match problem {
            ManifestProblem::Missing(path) => (path, "is missing"),
            ManifestProblem::Changed(path) => (path, "has changed since it was saved"),
            ManifestProblem::Unlisted(path) => (path, "was not saved with it"),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        return Err(misfit(format!("`{name}` {what}")));
    }
    let mut state: State = read_json(&dir.join("state.json"))?;
    let saved: TrainConfig = read_json(&dir.join("train_config.json"))?;
    if saved != *config {
        return Err(misfit("it was saved with a different [train] configuration".to_owned()));
    }
    if state.seed != fresh.seed {
        return Err(misfit(format!("it was saved with seed {}, but this run has seed {}", state.seed, fresh.seed)));
    }
    if state.plan != fresh.plan || state.data != fresh.data {
        return Err(misfit("it was saved with different training data".to_owned()));
    }
    if state.orthogonality != fresh.orthogonality {
        return Err(misfit("it was saved with different earlier adapters".to_owned()));
    }
    let identity = |state: &State| state.validation.as_ref().map(|v| (v.config.clone(), v.data.clone()));
    if identity(&state) != identity(&fresh) {
        return Err(misfit("it was saved with different [validation] settings or data".to_owned()));
    }
    keep_products(&mut state);
    let file = SafetensorsFile::open(&dir.join("model.safetensors"))?;
    let _no_graph = tch::no_grad_guard();
    let names = optimizer.names.clone();
    for (part, list) in PARTS.iter().zip([&mut optimizer.params, &mut optimizer.exp_avg, &mut optimizer.exp_avg_sq]) {
        for (name, t) in names.iter().zip(list) {
            let key = format!("{part}.{name}");
            let shape: Vec<usize> = t.size().iter().map(|&d| d as usize).collect();
            if file.info(&key).is_none_or(|i| i.shape != shape) {
                return Err(misfit(format!("it has no tensor `{key}` of shape {shape:?}")));
            }
            t.copy_(&load_tensor(&file, &key, t.kind(), t.device())?);
        }
    }
    let evaluated = state.validation.as_ref().is_some_and(|v| v.config.keep == Keep::Best && v.report.is_some());
    let saved = |(name, param): (&String, &Tensor)| {
        let best = load_tensor(&file, &best_name(name), param.kind(), Device::Cpu)?;
        if best.size() != param.size() {
            return Err(misfit(format!("tensor `{}` has the shape {:?}", best_name(name), best.size())));
        }
        Ok(best)
    };
    let pairs = names.iter().zip(&optimizer.params);
    let best = evaluated.then(|| pairs.map(saved).collect::<Result<Vec<Tensor>, TrainError>>()).transpose()?;
    Ok((state, best))
}

fn dtype(t: &Tensor) -> Dtype {
    match t.kind() {
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        _ => Dtype::F32,
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, TrainError> {
    let text = read_text(path, MAX_CONFIG)?;
    serde_json::from_str(&text).map_err(|e| TrainError::State { path: path.to_owned(), message: e.to_string() })
}
