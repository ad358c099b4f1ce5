use std::path::{Path, PathBuf};

use cl_adapters::Orthogonality;
use cl_checkpoint::{Adapter, Interrupt, Manifest, OutputDir};
use cl_data::{Buffer, ChatTemplate, Dataset, Encoded, Encoding, Mixture, PlannedSet, Profile, RowPlan, Tokenizer};
use cl_merge::adapter::fold;
use cl_model::Decoder;
use cl_torch::tch::Device;
use cl_train::{
    AtCheckpoint, Plan, Progress, Ranks, SpreadWeights, TrainConfig, TrainContext, TrainData, TrainReport, Validation,
    ValidationConfig, train,
};

use crate::kept;
use crate::model_dir::{ModelRef, adapter_hash, open_adapter, open_checkpoint, open_model, other_base, verify};
use crate::observe::tell;
use crate::output::discard;
use crate::rounds::is_stack;
use crate::trained::Trained;
use crate::{Event, LabError, Observer};

/// Inputs of a training round.
pub struct RoundInput<'a> {
    /// The model to start from.
    pub model: &'a ModelRef,
    /// Used to request a stop.
    pub interrupt: &'a Interrupt,
    /// The round's own data.
    pub data: &'a [Dataset],
    /// Data of each earlier round, for replay.
    pub earlier_data: &'a [Vec<Dataset>],
    /// How the data sets are combined.
    pub mixture: &'a Mixture,
    /// Training settings.
    pub config: &'a TrainConfig,
    /// Validation during training.
    pub validation: Option<RoundValidation<'a>>,
    /// Random seed of the round.
    pub seed: u64,
    /// Random seed of the fixed replay buffer, the same for all rounds.
    pub buffer_seed: u64,
    /// Which definitions apply.
    pub profile: Profile,
    /// Device to compute on.
    pub device: Device,
    /// Base and earlier adapters, which are merged with the new adapter in a single sum in f64. If `None`, the new
    /// adapter is merged into `model`.
    pub compose: Option<(&'a ModelRef, &'a [PathBuf])>,
    /// The processes that train together.
    pub ranks: &'a Ranks,
    /// Do no further steps: the result has the weights of the last checkpoint.
    pub finish: bool,
    /// Adapters of earlier rounds, in order, that `[train.olora]` keeps the new one orthogonal to.
    pub earlier: &'a [PathBuf],
}

/// Validation data of a round, and its settings.
#[derive(Clone, Copy)]
pub struct RoundValidation<'a> {
    /// Settings.
    pub config: &'a ValidationConfig,
    /// Validation data.
    pub data: &'a [Dataset],
}

/// Outputs of a round.
#[derive(Clone, Debug)]
pub struct RoundOutput {
    /// The adapter's directory, for LoRA.
    pub adapter: Option<PathBuf>,
    /// Directory of the resulting model.
    pub model: PathBuf,
    /// Training report; `None` if training had already been completed.
    pub report: Option<TrainReport>,
}

/// Runs a round of fine-tuning. Writes `log.jsonl`, `rows.json` (the rows used), `adapter/` (LoRA), `model/` and, with
/// `keep_checkpoints`, `checkpoints/` to `out`.
///
/// With several ranks, each rank calls this with the same input; rank 0 writes, and the others return when training
/// has ended.
///
/// Directories are written atomically. Completed directories are verified and kept, and interrupted training resumes
/// from its last checkpoint. If the base model changes during the round, no result is published.
///
/// # Errors
/// Returns an error if a file, the data or the training fails; [`LabError::is_interrupted`] tells whether a stop was
/// requested.
pub fn run_round(input: &RoundInput<'_>, out: &Path, observer: &mut Observer<'_>) -> Result<RoundOutput, LabError> {
    let (ranks, first) = (input.ranks, input.ranks.is_first());
    ranks.check_same("the base model", input.model.hash())?;
    if first {
        std::fs::create_dir_all(out).map_err(LabError::io(out))?;
        clean_up(out)?;
    }
    let (adapter, model, state) = (out.join("adapter"), out.join("model"), out.join("state"));
    let lora = input.config.lora.is_some();
    let trained = if lora { &adapter } else { &model };
    let stands = |dir: &Path| dir.join("manifest.json").exists();
    let report = if ranks.any(first && stands(trained))? {
        if first {
            verify(trained)?;
        }
        tell(observer, Event::Skipped("training"));
        None
    } else {
        Some(fine_tune(input, out, trained, observer)?)
    };
    if lora {
        stop_together(ranks, input.interrupt)?;
    }
    if !first {
        return Ok(RoundOutput { adapter: lora.then_some(adapter), model, report });
    }
    if lora && stands(&model) {
        verify(&model)?;
    } else if lora {
        tell(observer, Event::Stage("merging the adapter into the base model"));
        let (base, mut adapters) = match input.compose {
            Some((base, earlier)) => (base, earlier.to_vec()),
            None => (input.model, Vec::new()),
        };
        adapters.push(adapter.clone());
        fold_into(base, &adapters, &model)?;
    }
    // The training state is no longer needed once the result is complete.
    discard(&state)?;
    Ok(RoundOutput { adapter: lora.then_some(adapter), model, report })
}

/// Removes leftovers of killed processes from the directory of a round.
pub(crate) fn clean_up(round: &Path) -> Result<(), LabError> {
    for dir in ["adapter", "mixture", "model", "state"] {
        OutputDir::clean_up(&round.join(dir))?;
    }
    kept::clean_up(round)
}

/// Returns an error if a stop was requested.
pub(crate) fn stop_if_asked(interrupt: &Interrupt) -> Result<(), LabError> {
    if interrupt.requested() { Err(LabError::Interrupted) } else { Ok(()) }
}

/// Returns an error on all ranks if a stop was requested on any of them.
pub(crate) fn stop_together(ranks: &Ranks, interrupt: &Interrupt) -> Result<(), LabError> {
    if !ranks.any(interrupt.requested())? {
        return Ok(());
    }
    take_over_stop(interrupt);
    Err(LabError::Interrupted)
}

/// Adopts a stop requested on another rank. If this rank received a signal itself, it still exits with that signal.
pub(crate) fn take_over_stop(interrupt: &Interrupt) {
    if !interrupt.requested() {
        interrupt.request();
    }
}

fn fine_tune(
    input: &RoundInput<'_>,
    out: &Path,
    dir: &Path,
    observer: &mut Observer<'_>,
) -> Result<TrainReport, LabError> {
    let (checkpoint, tokenizer) = open_model(input.model.dir())?;
    let encoded = encode(input, &tokenizer)?;
    let (rows, steps) = plan_rows(input, &encoded, out)?;
    let rows_of = |epoch: u64| rows.epoch(epoch);
    let held_out = encode_all(input, &tokenizer, input.validation.iter().flat_map(|v| v.data))?.concat();
    let validation = input.validation.map(|v| Validation { config: v.config, examples: &held_out });

    let span = tracing::info_span!("training").entered();
    tell(observer, Event::Stage("training"));
    if input.config.zero_stage > 0 && input.ranks.world_size() > 1 {
        cl_torch::give_memory_back();
    }
    let divides = input.config.zero_stage == 3 && input.ranks.world_size() > 1;
    let spread = divides.then(|| SpreadWeights::new(input.ranks));
    let mut model = Decoder::load_with(&checkpoint, input.config.load_options(input.device), &|name, tensor| {
        Ok(match &spread {
            Some(spread) => spread.place(name, tensor),
            None => tensor,
        })
    })?;
    match &input.config.lora {
        Some(lora) => match &input.config.initial_adapter {
            Some(dir) => {
                let adapter = Adapter::open(dir)?;
                if let Some(warning) = other_base(&adapter, input.model.dir(), input.model.hash()) {
                    tracing::warn!("{warning}");
                }
                model.load_lora(&adapter, lora.lora_dropout)?;
            }
            None => model.add_lora(lora, input.seed)?,
        },
        None => model.set_requires_grad(true),
    }
    let orthogonality = orthogonality(input, &mut model)?;
    let data =
        TrainData { datasets: &encoded, epoch_rows: &rows_of, orthogonality: orthogonality.as_ref(), validation };
    let trained = Trained::new(input, &checkpoint)?;
    let keep = |step: u64, model: &Decoder| kept::write(out, step, input.config.keep_checkpoints, model, &trained);
    let at_checkpoint: Option<&AtCheckpoint<'_>> = (input.config.keep_checkpoints > 0).then_some(&keep);
    let context = TrainContext { at_checkpoint, ..input.context(out) };
    let observe = &mut |p: &Progress<'_>| tell(observer, Event::Step(p));
    let report = train(&mut model, &data, input.config, &steps, &context, spread, observe)?;
    drop(span);
    if !input.ranks.is_first() {
        return Ok(report);
    }
    if report.steps < steps.total_steps {
        // After early stopping or `finish`, fewer rows were used than planned.
        RowPlan { rows: steps.rows_in(report.steps), ..rows.clone() }.write(&out.join("rows.json"))?;
    }
    input.model.check()?;

    tell(observer, Event::Stage("saving"));
    trained.save(&model, dir, None)?;
    Ok(report)
}

/// Tokenizes the data sets of a round.
pub(crate) fn encode(input: &RoundInput<'_>, tokenizer: &Tokenizer) -> Result<Vec<Vec<Encoded>>, LabError> {
    encode_all(input, tokenizer, input.datasets())
}

fn encode_all<'d>(
    input: &RoundInput<'_>,
    tokenizer: &Tokenizer,
    datasets: impl Iterator<Item = &'d Dataset>,
) -> Result<Vec<Vec<Encoded>>, LabError> {
    let chat = ChatTemplate::from_dir(input.model.dir())?;
    let (max_length, profile) = (input.config.max_length, input.profile);
    let encoding = Encoding { tokenizer, chat: chat.as_ref(), max_length, profile };
    datasets.map(|d| encoding.examples(&d.examples).map_err(LabError::data(&d.path))).collect()
}

/// Determines the rows of every epoch and the steps of the round; writes `rows.json`.
pub(crate) fn plan_rows(
    input: &RoundInput<'_>,
    encoded: &[Vec<Encoded>],
    out: &Path,
) -> Result<(RowPlan, Plan), LabError> {
    let rows = row_plan(input, encoded);
    let steps = Plan::new(rows.rows_per_epoch(), input.config, input.profile == Profile::Paper)?;
    let steps = steps.for_ranks(input.config, input.ranks.world_size())?;
    if input.ranks.is_first() {
        RowPlan { rows: steps.rows_in_all(), ..rows.clone() }.write(&out.join("rows.json"))?;
    }
    Ok((rows, steps))
}

/// O-LoRA's penalty. With the shape `stack`, the earlier adapters are also added to the model, frozen.
fn orthogonality(input: &RoundInput<'_>, model: &mut Decoder) -> Result<Option<Orthogonality>, LabError> {
    let Some(olora) = &input.config.olora else { return Ok(None) };
    let base = open_checkpoint(input.model.dir())?;
    let earlier = input.earlier.iter().map(|dir| open_adapter(dir, &base)).collect::<Result<Vec<_>, LabError>>()?;
    if is_stack(input.config) {
        model.add_frozen(&earlier)?;
    }
    Ok(Some(Orthogonality::new(model.linears(), &earlier, olora)?))
}

impl RoundInput<'_> {
    /// Inputs of training other than model, data and settings.
    pub(crate) fn context<'c>(&'c self, out: &'c Path) -> TrainContext<'c> {
        let (seed, finish) = (self.seed, self.finish);
        TrainContext { seed, out, interrupt: self.interrupt, ranks: self.ranks, finish, at_checkpoint: None }
    }

    /// Returns the data sets of the earlier rounds, in order, then those of the round itself.
    pub(crate) fn datasets(&self) -> impl Iterator<Item = &Dataset> {
        self.earlier_data.iter().flatten().chain(self.data)
    }
}

/// Plans the rows of all epochs.
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
        held_out: set.held_out,
    });
    RowPlan::new(sets.collect(), input.seed, input.profile, input.config.shuffle, 0)
}

/// Returns the names of the data sets, or their paths where names are not unique.
pub(crate) fn names(input: &RoundInput<'_>) -> Vec<String> {
    let name = |d: &Dataset| match input.datasets().filter(|o| o.name == d.name).count() {
        1 => d.name.clone(),
        _ => d.path.display().to_string(),
    };
    input.datasets().map(name).collect()
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

/// Checks that the base is unchanged, and that a single adapter was trained on it.
fn check_base(opened: &[Adapter], dirs: &[PathBuf], base: &ModelRef) -> Result<(), LabError> {
    let (Some(adapter), [_]) = (opened.first(), dirs) else { return base.check() };
    match adapter.base_hash() {
        Some(hash) if hash != base.hash() => Err(LabError::Changed { path: base.dir().to_owned() }),
        _ => base.check(),
    }
}
