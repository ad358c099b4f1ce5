use std::path::Path;

use cl_checkpoint::Interrupt;
use cl_train::{Ranks, TrainError};

use crate::check::{Checked, require_train};
use crate::output::{RunDir, to_toml};
use crate::rounds::is_stack;
use crate::sources::{base_source, data_sources, inputs};
use crate::{LabError, ModelRef, Observer, RoundInput, RoundOutput, RoundValidation, TrainRun, run_round};

/// Runs `cl train`: one round as in [`run_round`], with the resolved configuration in `config.toml` and hashes of the
/// inputs in `base.blake3` and `data.blake3`. With `resume`, an unfinished run is continued.
///
/// # Errors
/// Returns the problems that [`check_train`](crate::check_train) finds, before anything is written;
/// [`LabError::Output`] if `out` is not empty and `resume` is false, or belongs to another run; and an error if the
/// round fails.
pub fn run_train(
    config: &TrainRun,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<RoundOutput, LabError> {
    run_train_on(&Ranks::alone(), config, out, resume, interrupt, observer)
}

/// Like [`run_train`] with `resume`, but without further steps: an unfinished run is finished with the weights of its
/// last checkpoint, or if it keeps the weights with the lowest validation loss, with those.
///
/// # Errors
/// Like [`run_train`], and [`TrainError::NoCheckpoint`] if there is no checkpoint.
pub fn finish_train_on(
    ranks: &Ranks,
    config: &TrainRun,
    out: &Path,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<RoundOutput, LabError> {
    run(ranks, config, out, Start::Finish, interrupt, observer)
}

/// Like [`run_train`], on several ranks. Each rank calls this with the same arguments and reads the model and the data;
/// only rank 0 uses `out`.
///
/// # Errors
/// Like [`run_train`], and if a rank has exited or has different inputs than rank 0.
pub fn run_train_on(
    ranks: &Ranks,
    config: &TrainRun,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<RoundOutput, LabError> {
    run(ranks, config, out, if resume { Start::Resume } else { Start::New }, interrupt, observer)
}

/// How a run starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    New,
    Resume,
    Finish,
}

fn run(
    ranks: &Ranks,
    config: &TrainRun,
    out: &Path,
    start: Start,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<RoundOutput, LabError> {
    let resume = start != Start::New;
    let is_part = |name: &str| out.join(name).exists();
    if start == Start::Finish
        && ranks.any(ranks.is_first() && !["state", "adapter", "model"].into_iter().any(is_part))?
    {
        return Err(TrainError::NoCheckpoint { path: out.to_owned() }.into());
    }
    let Checked { device, datasets, validation, .. } = require_train(config)?;
    let settings = to_toml(&out.join("config.toml"), config)?;
    let base = ModelRef::take(&config.model)?;
    let (earlier_data, data) = datasets.split_at(config.data.earlier.len());
    let data = data.concat();
    let held_out = validation.last().map_or(&[][..], Vec::as_slice);
    let of_file = held_out.iter().filter(|_| config.validation.as_ref().is_some_and(|v| v.data.is_some()));
    let of_file = of_file.collect::<Vec<_>>();
    let sources =
        [base_source(&base), data_sources(datasets.iter().flatten().chain(of_file.iter().copied()), &config.train)?];
    let earlier = config.train.olora.as_ref().map_or(&[][..], |o| &o.earlier);
    let inputs =
        inputs(&config.model, &config.train, datasets.iter().flatten().chain(of_file).map(|d| d.path.as_path()));
    let marker = "config.toml";
    let dir = RunDir { out, what: "run", marker, settings: &settings, sources: &sources, inputs: &inputs, resume };
    let _lock = ranks.is_first().then(|| dir.open()).transpose()?;
    let input = RoundInput {
        model: &base,
        interrupt,
        finish: start == Start::Finish,
        ranks,
        data: &data,
        earlier_data,
        mixture: &config.mixture(),
        config: &config.train,
        validation: config.validation.as_ref().map(|config| RoundValidation { config, data: held_out }),
        // The seed that this round has in a sequence; otherwise it would have the same initialization as the first
        // round.
        seed: if earlier.is_empty() { config.seed } else { config.seed.wrapping_add(earlier.len() as u64 + 1) },
        buffer_seed: config.seed,
        profile: config.profile,
        device,
        compose: is_stack(&config.train).then_some((&base, earlier)),
        earlier,
    };
    run_round(&input, out, observer)
}
