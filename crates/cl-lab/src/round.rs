use std::path::{Path, PathBuf};

use cl_adapters::{Orthogonality, save_lora};
use cl_checkpoint::{Adapter, Checkpoint, Interrupt, Manifest, OutputDir};
use cl_data::{Buffer, ChatTemplate, Dataset, Encoded, Encoding, Mixture, PlannedSet, Profile, RowPlan, Tokenizer};
use cl_merge::adapter::fold;
use cl_model::Decoder;
use cl_torch::tch::{Device, Kind};
use cl_train::{Plan, TrainConfig, TrainData, TrainReport, train};
use serde_json::json;

use crate::model_dir::{ModelRef, adapter_hash, open_checkpoint, open_model, verify};
use crate::observe::tell;
use crate::output::discard;
use crate::rounds::is_stack;
use crate::{Event, LabError, Observer};

/// Everything one round of fine-tuning is made from.
pub struct RoundInput<'a> {
    /// The model to start from.
    pub model: &'a ModelRef,
    /// A request to stop.
    pub interrupt: &'a Interrupt,
    /// The round's own data.
    pub data: &'a [Dataset],
    /// Data of each earlier round, for replay.
    pub earlier_data: &'a [Vec<Dataset>],
    /// How these share an epoch.
    pub mixture: &'a Mixture,
    /// How to train.
    pub config: &'a TrainConfig,
    /// Random seed of the round.
    pub seed: u64,
    /// Random seed of what stays the same over rounds: replay's fixed buffer.
    pub buffer_seed: u64,
    /// Whose semantics.
    pub profile: Profile,
    /// Where to compute.
    pub device: Device,
    /// Base and adapters whose sum, taken at once in f64, is the folded model; the model and the new adapter when `None`.
    pub compose: Option<(&'a ModelRef, &'a [PathBuf])>,
    /// Adapters of earlier rounds, first to last, that `[train.olora]` keeps the new one away from.
    pub earlier: &'a [PathBuf],
}

/// What a round left behind.
#[derive(Clone, Debug)]
pub struct RoundOutput {
    /// The adapter's directory, for LoRA.
    pub adapter: Option<PathBuf>,
    /// The model with what was learned in it.
    pub model: PathBuf,
    /// The training's report; `None` when it was found done.
    pub report: Option<TrainReport>,
}

/// Runs one round into `out`: `log.jsonl`, `rows.json` (which rows are used), `adapter/` for LoRA, `model/`.
///
/// Each directory appears whole; what is there already is checked and not made again, and a training that was killed goes on
/// from its last saved state. The base is hashed once; if it is replaced meanwhile, nothing is published.
///
/// # Errors
/// Anything the files, the data or the training raise; [`LabError::is_interrupted`] when the round was asked to stop.
pub fn run_round(input: &RoundInput<'_>, out: &Path, observer: &mut Observer<'_>) -> Result<RoundOutput, LabError> {
    std::fs::create_dir_all(out).map_err(LabError::io(out))?;
    clean_up(out)?;
    let (adapter, model, state) = (out.join("adapter"), out.join("model"), out.join("state"));
    let lora = input.config.lora.is_some();
    let trained = if lora { &adapter } else { &model };
    let stands = |dir: &Path| dir.join("manifest.json").exists();
    let report = if stands(trained) {
        verify(trained)?;
        tell(observer, Event::Skipped("training"));
        None
    } else {
        Some(fine_tune(input, out, trained, observer)?)
    };
    if lora && stands(&model) {
        verify(&model)?;
    } else if lora {
        stop_if_asked(input.interrupt)?;
        tell(observer, Event::Stage("folding the adapter into its base"));
        let (base, mut adapters) = match input.compose {
            Some((base, earlier)) => (base, earlier.to_vec()),
            None => (input.model, Vec::new()),
        };
        adapters.push(adapter.clone());
        fold_into(base, &adapters, &model)?;
    }
    // The resumable state has served its purpose once the result stands.
    discard(&state)?;
    Ok(RoundOutput { adapter: lora.then_some(adapter), model, report })
}

/// Removes what killed processes left in the directory of a round.
pub(crate) fn clean_up(round: &Path) -> Result<(), LabError> {
    for dir in ["adapter", "mixture", "model", "state"] {
        OutputDir::clean_up(&round.join(dir))?;
    }
    Ok(())
}

/// Ends a run between two of its stages when that was asked for.
pub(crate) fn stop_if_asked(interrupt: &Interrupt) -> Result<(), LabError> {
    if interrupt.requested() { Err(LabError::Interrupted) } else { Ok(()) }
}

fn fine_tune(
    input: &RoundInput<'_>,
    out: &Path,
    trained: &Path,
    observer: &mut Observer<'_>,
) -> Result<TrainReport, LabError> {
    let (checkpoint, tokenizer) = open_model(input.model.dir())?;
    let encoded = encode(input, &tokenizer)?;
    let (rows, steps) = plan_rows(input, &encoded, out)?;
    let rows_of = |epoch: u64| rows.epoch(epoch);

    let span = tracing::info_span!("training").entered();
    tell(observer, Event::Stage("training"));
    let mut model = Decoder::load(&checkpoint, input.config.load_options(input.device))?;
    match &input.config.lora {
        Some(lora) => match &input.config.initial_adapter {
            Some(dir) => model.load_lora(&Adapter::open(dir)?, lora.lora_dropout)?,
            None => model.add_lora(lora, input.seed)?,
        },
        None => model.set_requires_grad(true),
    }
    let orthogonality = orthogonality(input, &mut model)?;
    let data = TrainData { datasets: &encoded, epoch_rows: &rows_of, orthogonality: orthogonality.as_ref() };
    let report = train(&mut model, &data, input.config, &steps, input.seed, out, input.interrupt, &mut |p| {
        tell(observer, Event::Step(p))
    })?;
    drop(span);
    input.model.check()?;

    tell(observer, Event::Stage("saving"));
    let manifest = manifest(input, if input.config.lora.is_some() { "adapter" } else { "model" })?;
    match &input.config.lora {
        Some(lora) => {
            // An initial adapter decides rank and scaling; what is saved has to say the same.
            let lora = match &input.config.initial_adapter {
                Some(dir) => lora.continued(&Adapter::open(dir)?),
                None => lora.clone(),
            };
            let base = input.model.dir().display().to_string();
            save_lora(trained, model.sites(), &model.trained_whole(), &lora, &base, manifest, true)?;
        }
        None => {
            let companions = companions(&checkpoint)?;
            let kind = model.named_parameters()[0].1.kind();
            let stored = stored_kind(&checkpoint).unwrap_or(kind);
            model.save(trained, stored, checkpoint.config(), &companions, manifest, true)?;
        }
    }
    Ok(report)
}

/// The data sets of a round as tokens.
pub(crate) fn encode(input: &RoundInput<'_>, tokenizer: &Tokenizer) -> Result<Vec<Vec<Encoded>>, LabError> {
    let chat = ChatTemplate::from_dir(input.model.dir())?;
    let (max_length, profile) = (input.config.max_length, input.profile);
    let encoding = Encoding { tokenizer, chat: chat.as_ref(), max_length, profile };
    input.datasets().map(|d| encoding.examples(&d.examples).map_err(LabError::data(&d.path))).collect()
}

/// Which rows every epoch goes through, and the steps of the round; writes `rows.json`.
pub(crate) fn plan_rows(
    input: &RoundInput<'_>,
    encoded: &[Vec<Encoded>],
    out: &Path,
) -> Result<(RowPlan, Plan), LabError> {
    let rows = row_plan(input, encoded);
    let steps = Plan::new(rows.rows_per_epoch(), input.config, input.profile == Profile::Paper)?;
    RowPlan { rows: steps.rows_in_all(), ..rows.clone() }.write(&out.join("rows.json"))?;
    Ok((rows, steps))
}

/// What `[train.olora]` asks for, and, in its shape `stack`, the earlier adapters beside the model.
fn orthogonality(input: &RoundInput<'_>, model: &mut Decoder) -> Result<Option<Orthogonality>, LabError> {
    let Some(olora) = &input.config.olora else { return Ok(None) };
    let earlier = input.earlier.iter().map(|dir| Ok(Adapter::open(dir)?)).collect::<Result<Vec<_>, LabError>>()?;
    if is_stack(input.config) {
        model.add_frozen(&earlier)?;
    }
    Ok(Some(Orthogonality::new(model.linears(), &earlier, olora)?))
}

/// The dtype of the base's embedding, which the result keeps.
fn stored_kind(checkpoint: &Checkpoint) -> Option<Kind> {
    use cl_checkpoint::TensorSource;
    cl_torch::kind_of(checkpoint.info("model.embed_tokens.weight")?.dtype)
}

fn companions(checkpoint: &Checkpoint) -> Result<Vec<(String, Vec<u8>)>, LabError> {
    checkpoint
        .companion_files()?
        .into_iter()
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, std::fs::read(&path).map_err(LabError::io(&path))?))
        })
        .collect()
}

impl RoundInput<'_> {
    /// Data of the earlier rounds in turn, then the round's own.
    fn datasets(&self) -> impl Iterator<Item = &Dataset> {
        self.earlier_data.iter().flatten().chain(self.data)
    }
}

/// Which rows every epoch goes through.
fn row_plan(input: &RoundInput<'_>, encoded: &[Vec<Encoded>]) -> RowPlan {
    let sizes = |sets: &[Dataset]| sets.iter().map(|d| d.examples.len()).collect::<Vec<usize>>();
    let earlier: Vec<Vec<usize>> = input.earlier_data.iter().map(|sets| sizes(sets)).collect();
    let lengths = input.mixture.rows_per_epoch(&earlier, &sizes(input.data));
    let replayed = earlier.iter().map(Vec::len).sum::<usize>();
    let fixed = input.mixture.replay.is_some_and(|r| r.buffer == Buffer::Fixed).then_some(input.buffer_seed);
    let sets = input.datasets().zip(names(input)).zip(encoded.iter().zip(lengths)).enumerate();
    let sets = sets.map(|(i, ((set, name), (rows, rows_per_epoch)))| PlannedSet {
        name,
        path: set.path.clone(),
        blake3: set.hash.clone(),
        rows: rows.len(),
        rows_per_epoch,
        fixed_seed: fixed.filter(|_| i < replayed),
    });
    RowPlan::new(sets.collect(), input.seed, input.profile, input.config.shuffle, 0)
}

/// Names of the data sets, or their paths where names are not enough to tell them apart.
pub(crate) fn names(input: &RoundInput<'_>) -> Vec<String> {
    let name = |d: &Dataset| match input.datasets().filter(|o| o.name == d.name).count() {
        1 => d.name.clone(),
        _ => d.path.display().to_string(),
    };
    input.datasets().map(name).collect()
}

fn manifest(input: &RoundInput<'_>, kind: &str) -> Result<Manifest, LabError> {
    let base = input.model;
    let mut manifest = Manifest::new(kind).with_source("base", base.dir(), base.hash().to_owned());
    for data in input.datasets() {
        manifest = manifest.with_source("data", &data.path, data.hash.clone());
    }
    if let Some(dir) = &input.config.initial_adapter {
        manifest = manifest.with_source("initial_adapter", dir, adapter_hash(dir)?);
    }
    for dir in input.earlier {
        manifest = manifest.with_source("earlier_adapter", dir, adapter_hash(dir)?);
    }
    let config = json!({"train": input.config, "mixture": input.mixture, "seed": input.seed, "profile": input.profile});
    Ok(manifest.with_config(config))
}

fn fold_into(base: &ModelRef, adapters: &[PathBuf], out: &Path) -> Result<(), LabError> {
    let mut manifest = Manifest::new("model").with_source("base", base.dir(), base.hash().to_owned());
    let mut opened = Vec::new();
    for dir in adapters {
        manifest = manifest.with_source("adapter", dir, adapter_hash(dir)?);
        opened.push(Adapter::open(dir)?);
    }
    check_base(&opened, adapters, base)?;
    fold(&open_checkpoint(base.dir())?, &opened, out, manifest, true)?;
    Ok(())
}

/// That the first adapter of a fold, which was trained on the fold's base, names the hash that the base has now.
fn check_base(opened: &[Adapter], dirs: &[PathBuf], base: &ModelRef) -> Result<(), LabError> {
    let (Some(adapter), [_]) = (opened.first(), dirs) else { return base.check() };
    match adapter.base_hash() {
        Some(hash) if hash != base.hash() => Err(LabError::Changed { path: base.dir().to_owned() }),
        _ => base.check(),
    }
}
