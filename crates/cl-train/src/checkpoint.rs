//! Checkpoints of a round in progress: the trained tensors, both moments and the step, in a directory that is replaced
//! atomically. Tensors are stored in full, or in [parts](crate::parts) that each rank writes and reads.

use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_checkpoint::{
    CheckpointWriter, Dtype, Manifest, ManifestProblem, OutputDir, SafetensorsFile, TensorSource, TensorSpec,
    WriteOptions,
};
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{Products, load_tensor, products, tensor_bytes, use_products};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adamw::Optimizer;
use crate::parts::{self, Parts};
use crate::problem::StateProblem;
use crate::validation::ValidationState;
use crate::{Keep, Plan, Ranks, TrainConfig, TrainError};

/// Progress of a run. The order of the data and dropout follow from seed and step, so nothing else has to be saved. The
/// other fields identify the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Number of completed steps.
    pub(crate) step: u64,
    /// Random seed of the run.
    pub(crate) seed: u64,
    /// The run's division into steps.
    pub(crate) plan: Plan,
    /// Hash of the training data.
    pub(crate) data: String,
    /// The library that computes the run's f32 products on a CPU, by [`Products::name`]. Checkpoints without this field
    /// used libtorch's.
    #[serde(default = "libtorch")]
    pub(crate) products: String,
    /// Hash of the earlier adapters to which the run keeps its adapter orthogonal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) orthogonality: Option<String>,
    /// State of the validation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) validation: Option<ValidationState>,
}

fn libtorch() -> String {
    Products::Libtorch.name().to_owned()
}

/// Selects the library that has computed the run's products so far, so that the results are those of an uninterrupted
/// run.
///
/// On the same machine, this has no effect. On another machine, it keeps the library if it is available; the last bits
/// can still differ, since libraries select instructions by the processor.
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

/// Kind of the directory in its manifest.
const KIND: &str = "train_state";

const TENSORS: [&str; 3] = ["param", "exp_avg", "exp_avg_sq"];

/// Name under which a tensor of the best weights so far is saved.
fn best_name(name: &str) -> String {
    format!("best.{name}")
}

/// Saves a checkpoint; all ranks must call this. Rank 0 writes full tensors, or with `sharded_checkpoints` every rank
/// writes its parts. `best` are this rank's parts of the weights with the lowest validation loss, if they are kept.
pub(crate) fn save(
    dir: &Path,
    optimizer: &Optimizer,
    best: Option<&[Tensor]>,
    config: &TrainConfig,
    state: &State,
    ranks: &Ranks,
) -> Result<(), TrainError> {
    let mut tensors: Vec<Saved<'_>> = Vec::new();
    for (part, list) in TENSORS.iter().zip([&optimizer.own, &optimizer.exp_avg, &optimizer.exp_avg_sq]) {
        let names = optimizer.names.iter().zip(list).enumerate();
        tensors.extend(names.map(|(place, (n, own))| Saved { name: format!("{part}.{n}"), place, own }));
    }
    let names = optimizer.names.iter().zip(best.into_iter().flatten()).enumerate();
    tensors.extend(names.map(|(place, (n, own))| Saved { name: best_name(n), place, own }));
    let json = |v: serde_json::Result<Value>| v.expect("plain structs are JSON");
    let state = ("state.json", json(serde_json::to_value(state)));
    let config_file = ("train_config.json", json(serde_json::to_value(config)));
    match &optimizer.sharding {
        Some(_) if config.sharded_checkpoints => save_parts(dir, optimizer, &tensors, &[state, config_file], ranks),
        _ => save_whole(dir, optimizer, &tensors, &[state, config_file], ranks),
    }
}

/// A tensor to be saved.
struct Saved<'a> {
    name: String,
    /// Index of the parameter that it belongs to.
    place: usize,
    /// This rank's shard of it, or the full tensor.
    own: &'a Tensor,
}

fn save_whole(
    dir: &Path,
    optimizer: &Optimizer,
    tensors: &[Saved<'_>],
    files: &[(&str, Value)],
    ranks: &Ranks,
) -> Result<(), TrainError> {
    let spec = |t: &Saved<'_>| {
        let shape = optimizer.params[t.place].size().iter().map(|&d| d as usize).collect();
        TensorSpec { name: t.name.clone(), dtype: dtype(t.own), shape }
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let options = WriteOptions { overwrite: true, max_shard_size: u64::MAX };
    let writer = ranks.is_first().then(|| CheckpointWriter::create(dir, &specs, options)).transpose()?;
    for group in in_messages(tensors, |t| t.own) {
        let own: Vec<(usize, &Tensor)> = group.iter().map(|t| (t.place, t.own)).collect();
        for (saved, whole) in group.iter().zip(optimizer.whole(&own)?) {
            if let Some(writer) = &writer {
                writer.write(&saved.name, &tensor_bytes(&whole, whole.kind()))?;
            }
        }
    }
    let Some(writer) = writer else { return Ok(()) };
    files.iter().try_for_each(|(name, value)| writer.put_json(name, value))?;
    Ok(writer.finish(Manifest::new(KIND))?)
}

/// Divides tensors into groups that are each sent in one message: tensors of one dtype, with a total of a few MB unless
/// a single tensor is larger. On a network, hundreds of small messages would be limited by latency.
fn in_messages<T>(tensors: &[T], of: impl Fn(&T) -> &Tensor) -> Vec<&[T]> {
    const BYTES: usize = 8 << 20;
    let bytes = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
    let mut groups = Vec::new();
    let mut rest = tensors;
    while let Some(first) = rest.first() {
        let mut sum = 0;
        let fits = |item: &&T| {
            sum += bytes(of(item));
            sum <= BYTES && of(item).kind() == of(first).kind()
        };
        let (group, others) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        groups.push(group);
        rest = others;
    }
    groups
}

/// Makes every rank write a file with its parts into a directory that rank 0 creates and finalizes.
fn save_parts(
    dir: &Path,
    optimizer: &Optimizer,
    tensors: &[Saved<'_>],
    files: &[(&str, Value)],
    ranks: &Ranks,
) -> Result<(), TrainError> {
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    let out = ranks.is_first().then(|| OutputDir::create(dir, true)).transpose()?;
    let name = out.as_ref().and_then(|out| out.path().file_name()).unwrap_or_default();
    // Only the name is sent, since machines may mount the file system at different paths.
    let part = dir.with_file_name(ranks.text_from_first(&name.to_string_lossy())?);
    let own = |t: &Saved<'_>| {
        let count = optimizer.params[t.place].numel();
        let length = parts::elements(count, rank, world_size).len();
        (t.name.clone(), t.own.detach().narrow(0, 0, length as i64))
    };
    let own: Vec<(String, Tensor)> = tensors.iter().map(own).collect();
    let entry = parts::write(&part.join(parts::file_name(rank, world_size)), &own)?;
    let entries = ranks.texts_of_all(&serde_json::to_string(&entry).expect("a plain struct is JSON"))?;
    let Some(out) = out else { return Ok(()) };
    let mut manifest = Manifest::new(KIND);
    for (rank, entry) in entries.iter().enumerate() {
        manifest.files.insert(parts::file_name(rank, world_size), from_json(dir, entry)?);
    }
    for (name, value) in files {
        let path = out.path().join(name);
        std::fs::write(&path, format!("{value:#}\n")).map_err(TrainError::io(&path))?;
    }
    Ok(out.finish(manifest)?)
}

/// Checks before the first step that all ranks see the same directory, as `sharded_checkpoints` requires.
pub(crate) fn check_shared(out: &Path, ranks: &Ranks) -> Result<(), TrainError> {
    let mut file = None;
    if ranks.is_first() {
        std::fs::create_dir_all(out).map_err(TrainError::io(out))?;
        let made = tempfile::Builder::new().prefix(".cl-shared-").tempfile_in(out).map_err(TrainError::io(out))?;
        file = Some(made);
    }
    let name = file.as_ref().and_then(|file| file.path().file_name()).unwrap_or_default();
    let name = ranks.text_from_first(&name.to_string_lossy())?;
    let seen = out.join(&name).exists();
    // All ranks take part, so that none continues without the others, and so that the file exists until all have looked
    // for it.
    if ranks.any(!seen)? { Err(TrainError::NotShared { path: out.to_owned() }) } else { Ok(()) }
}

/// Loads a saved state into the optimizer, if there is one, and returns the progress and this rank's parts of the best
/// weights; otherwise returns `fresh`. Full tensors are read by rank 0 and broadcast; of sharded ones, every rank reads
/// the parts that it needs.
pub(crate) fn resume(
    dir: &Path,
    optimizer: &mut Optimizer,
    config: &TrainConfig,
    fresh: State,
    ranks: &Ranks,
) -> Result<(State, Option<Vec<Tensor>>), TrainError> {
    let json = |state: &State| serde_json::to_string(state).expect("a plain struct is JSON");
    // Ranks on machines with other processors may use another library for products, so it is not compared.
    let identity = State { products: String::new(), ..fresh.clone() };
    ranks.check_same("[train]", &serde_json::to_string(config).expect("a plain struct is JSON"))?;
    ranks.check_same("the training data, its order or the random seed", &json(&identity))?;
    let saved = if ranks.is_first() { read(dir, config, &fresh, ranks)? } else { None };
    let saved = serde_json::to_string(&saved).expect("plain structs are JSON");
    let Some((mut state, writers)) = from_json::<Option<(State, usize)>>(dir, &ranks.text_from_first(&saved)?)? else {
        return Ok((fresh, None));
    };
    keep_products(&mut state);
    let has_best = state.validation.as_ref().is_some_and(|v| v.config.keep == Keep::Best && v.report.is_some());
    let source = Source::open(dir, writers, ranks)?;
    for (name, param) in optimizer.names.iter().zip(&optimizer.params) {
        let keys = TENSORS.iter().map(|part| format!("{part}.{name}")).chain(has_best.then(|| best_name(name)));
        for key in keys {
            source.check(&key, param).map_err(|problem| misfit(dir, problem))?;
        }
    }
    let _no_graph = tch::no_grad_guard();
    for (part, list) in TENSORS.iter().zip([&optimizer.own, &optimizer.exp_avg, &optimizer.exp_avg_sq]) {
        let name = |name: &String| format!("{part}.{name}");
        source.read(name, optimizer, ranks, |place, saved| list[place].detach().copy_(&saved))?;
    }
    if let Some(sharding) = &optimizer.sharding {
        sharding.share_updates()?;
    }
    let mut best = Vec::new();
    if has_best {
        source.read(|name| best_name(name), optimizer, ranks, |_, saved| best.push(saved))?;
    }
    Ok((state, has_best.then_some(best)))
}

/// The source of saved tensors.
enum Source {
    /// Full tensors in one file, which rank 0 reads.
    First(SafetensorsFile),
    /// Full tensors that are received from rank 0.
    FromFirst,
    /// Parts that ranks wrote, which every rank reads.
    Parts(Parts),
}

impl Source {
    fn open(dir: &Path, writers: usize, ranks: &Ranks) -> Result<Source, TrainError> {
        if writers == 0 && !ranks.is_first() {
            return Ok(Source::FromFirst);
        }
        if !ranks.is_first() {
            if !dir.join("manifest.json").exists() {
                return Err(TrainError::NotShared { path: dir.to_owned() });
            }
            // Rank 0 has already verified its share.
            verify(dir, ranks)?;
        }
        Ok(match writers {
            0 => Source::First(SafetensorsFile::open(&dir.join("model.safetensors"))?),
            _ => Source::Parts(Parts::open(dir, writers)?),
        })
    }

    fn check(&self, name: &str, param: &Tensor) -> Result<(), StateProblem> {
        match self {
            Source::FromFirst => Ok(()),
            Source::Parts(parts) => parts.check(name, param.kind(), &param.size()),
            Source::First(file) => {
                let shape: Vec<usize> = param.size().iter().map(|&d| d as usize).collect();
                let complete = file.info(name).is_some_and(|info| info.shape == shape);
                if complete { Ok(()) } else { Err(StateProblem::Tensor { tensor: name.to_owned(), shape }) }
            }
        }
    }

    /// Reads the saved tensor of each parameter, and passes this rank's shard of it (or all of it) in host memory to
    /// `take`. All ranks must call this for the same tensors in the same order.
    fn read(
        &self,
        saved_name: impl Fn(&String) -> String,
        optimizer: &Optimizer,
        ranks: &Ranks,
        mut take: impl FnMut(usize, Tensor),
    ) -> Result<(), TrainError> {
        let params: Vec<(usize, &Tensor)> = optimizer.params.iter().enumerate().collect();
        for group in in_messages(&params, |(_, param)| param) {
            let whole = |(place, param): &(usize, &Tensor)| -> Result<Tensor, TrainError> {
                let (name, kind) = (saved_name(&optimizer.names[*place]), param.kind());
                match self {
                    Source::First(file) => Ok(load_tensor(file, &name, kind, Device::Cpu)?),
                    Source::FromFirst => Ok(Tensor::zeros(param.size(), (kind, Device::Cpu))),
                    Source::Parts(parts) => read_part(parts, &name, param, optimizer, ranks),
                }
            };
            let mut read = group.iter().map(whole).collect::<Result<Vec<Tensor>, TrainError>>()?;
            if !matches!(self, Source::Parts(_)) {
                ranks.copy_from_first(&read)?;
                read = read.iter().map(|whole| optimizer.part(whole)).collect();
            }
            group.iter().zip(read).for_each(|((place, _), own)| take(*place, own));
        }
        Ok(())
    }
}

/// Reads this rank's shard of a tensor that was saved in parts, or all of it if nothing is sharded.
fn read_part(
    parts: &Parts,
    name: &str,
    param: &Tensor,
    optimizer: &Optimizer,
    ranks: &Ranks,
) -> Result<Tensor, TrainError> {
    let (kind, count) = (param.kind(), param.numel());
    if optimizer.sharding.is_none() {
        return Ok(parts.read(name, kind, count, 0..count)?.reshape(param.size()));
    }
    let wanted = parts::elements(count, ranks.rank(), ranks.world_size());
    let missing = count.div_ceil(ranks.world_size()) - wanted.len();
    Ok(parts.read(name, kind, count, wanted)?.constant_pad_nd([0, missing as i64]))
}

/// Verifies this rank's share of a checkpoint against the manifest. A checkpoint of full tensors is verified by rank 0
/// alone.
fn verify(dir: &Path, ranks: &Ranks) -> Result<usize, TrainError> {
    let writers = Parts::count(&Manifest::read(dir)?);
    let problems = match writers {
        0 => Manifest::verify(dir)?,
        _ => Manifest::verify_share(dir, ranks.rank(), ranks.world_size())?,
    };
    let Some(problem) = problems.into_iter().next() else { return Ok(writers) };
    let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Err(misfit(
        dir,
        match problem {
            ManifestProblem::Missing(path) => StateProblem::Missing { file: name(path) },
            ManifestProblem::Changed(path) => StateProblem::Changed { file: name(path) },
            ManifestProblem::Unlisted(path) => StateProblem::Unlisted { file: name(path) },
        },
    ))
}

/// Reads a saved state, if there is one, and checks that it belongs to this run. Also returns the number of ranks that
/// wrote parts, or 0.
fn read(dir: &Path, config: &TrainConfig, fresh: &State, ranks: &Ranks) -> Result<Option<(State, usize)>, TrainError> {
    if !dir.join("manifest.json").exists() {
        return Ok(None);
    }
    let writers = verify(dir, ranks)?;
    let state: State = read_json(&dir.join("state.json"))?;
    let saved: TrainConfig = read_json(&dir.join("train_config.json"))?;
    let identity = |state: &State| state.validation.as_ref().map(|v| (v.config.clone(), v.data.clone()));
    let problem = if saved.of_weights() != config.of_weights() {
        StateProblem::Config
    } else if state.seed != fresh.seed {
        StateProblem::Seed { saved: state.seed, seed: fresh.seed }
    } else if state.plan != fresh.plan || state.data != fresh.data {
        StateProblem::Data
    } else if state.orthogonality != fresh.orthogonality {
        StateProblem::Earlier
    } else if identity(&state) != identity(fresh) {
        StateProblem::Validation
    } else {
        return Ok(Some((state, writers)));
    };
    Err(misfit(dir, problem))
}

fn misfit(dir: &Path, problem: StateProblem) -> TrainError {
    TrainError::State { path: dir.to_owned(), problem }
}

pub(crate) fn dtype(t: &Tensor) -> Dtype {
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
