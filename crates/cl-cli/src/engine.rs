//! `cl-engine`: the complete `cl`, including the commands that run a model.

mod commands;
mod progress;

use std::process::ExitCode;

use anyhow::{Result, bail};
use cl_cli::Context;
use cl_cli::light::ModelCommand;
use cl_torch::Rendezvous;

use crate::progress::AboveBars;

fn main() -> ExitCode {
    cl_cli::run(|log| log.init(|| AboveBars), run)
}

fn run(command: ModelCommand, context: Context<'_>) -> Result<()> {
    let Context { threads, log, interrupt, out } = context;
    // This must come before any other use of libtorch, which detects CUDA only once.
    cl_torch::load_cuda()?;
    let meeting = Rendezvous::from_env()?;
    let has_ranks = matches!(command, ModelCommand::Train(_) | ModelCommand::Sequence(_) | ModelCommand::Eval(_));
    if let (Some(meeting), false) = (&meeting, has_ranks) {
        bail!(
            "only `cl train`, `cl sequence` and `cl eval` run as several processes, but this is one of {}; start it without \
             torchrun or another launcher, or unset WORLD_SIZE",
            meeting.world_size
        );
    }
    if let Some(threads) = threads.or_else(|| share_of_cores(meeting.as_ref())) {
        cl_torch::set_threads(threads);
    }
    if computes(&command) {
        cl_torch::watch_load();
    }
    match command {
        ModelCommand::Generate(args) => commands::generate::run(args, interrupt, out),
        ModelCommand::Chat(args) => commands::chat::run(args, interrupt, out),
        ModelCommand::Train(args) => commands::train::run(&args, log, interrupt, out),
        ModelCommand::Sequence(args) => commands::sequence::run(&args, log, interrupt, out),
        ModelCommand::Eval(args) => commands::eval::run(args, log, interrupt, out),
        ModelCommand::Perplexity(args) => commands::perplexity::run(args, interrupt, out),
        ModelCommand::Route(args) => commands::moe::route(&args, interrupt, out),
        ModelCommand::RouterStates(args) => commands::moe::states(&args, interrupt, out),
        ModelCommand::TrainRouter(args) => commands::moe::train_router(&args, log, interrupt, out),
        ModelCommand::Check(args) => commands::check::run(&args, interrupt, out),
        ModelCommand::Plan(args) => commands::plan::run(&args, out),
        ModelCommand::Study(args) => commands::study::run(&args, log, interrupt, out),
        ModelCommand::Reproduce(args) => commands::reproduce::run(&args, log, interrupt, out),
    }
}

/// Returns the number of threads for each of several processes on this machine, unless the user or the launcher set it.
fn share_of_cores(meeting: Option<&Rendezvous>) -> Option<u16> {
    let processes = meeting?.local_world_size.filter(|n| *n > 1 && std::env::var_os("OMP_NUM_THREADS").is_none())?;
    let cores = std::thread::available_parallelism().ok()?.get();
    u16::try_from((cores / processes).max(1)).ok()
}

/// Whether the command keeps libtorch's threads busy all the time.
fn computes(command: &ModelCommand) -> bool {
    !matches!(command, ModelCommand::RouterStates(_) | ModelCommand::Check(_) | ModelCommand::Plan(_))
}
