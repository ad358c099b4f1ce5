//! The commands that run a model, one per file.

pub mod chat;
mod chat_template;
pub mod check;
pub mod decoding;
pub mod eval;
pub mod generate;
mod input;
mod loaded;
pub mod moe;
pub mod perplexity;
pub mod plan;
mod prompts;
mod reply;
pub mod reproduce;
pub mod sequence;
pub mod study;
pub mod train;
mod units;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_cli::output::say;
use cl_hub::{HubArgs, HubError, Names, Part};
use cl_train::{Ranks, TrainConfig};

/// Reads a configuration file.
pub fn read(path: &Path) -> Result<String> {
    Ok(cl_checkpoint::files::read_text(path, cl_checkpoint::files::MAX_CONFIG)?)
}

/// Replaces the names of a model and adapters by their directories; with `--hub`, missing ones are downloaded.
fn locate(hub: HubArgs, model: &mut PathBuf, adapters: &mut [PathBuf], interrupt: &Interrupt) -> Result<(), HubError> {
    let names = hub.names(interrupt);
    *model = names.directory(model, Part::Model)?;
    adapters.iter_mut().try_for_each(|dir| locate_adapter(&names, dir))
}

/// Like [`locate`], for an adapter.
fn locate_adapter(names: &Names, dir: &mut PathBuf) -> Result<(), HubError> {
    *dir = names.directory(dir, Part::Adapter)?;
    Ok(())
}

/// Like [`locate`], for the model of a configuration, and for adapters that training starts from or stays orthogonal
/// to.
fn locate_training(
    hub: HubArgs,
    model: &mut PathBuf,
    train: &mut TrainConfig,
    interrupt: &Interrupt,
) -> Result<(), HubError> {
    locate(hub, model, &mut [], interrupt)?;
    let names = hub.names(interrupt);
    let earlier = train.olora.iter_mut().flat_map(|olora| &mut olora.earlier);
    train.initial_adapter.iter_mut().chain(earlier).try_for_each(|dir| locate_adapter(&names, dir))
}

/// Runs `work` without log messages. Used on all ranks except the first, which logs for all of them.
fn in_silence<T>(work: impl FnOnce() -> T) -> T {
    tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), work)
}

/// Meets the other ranks, if there are any. A stop request during this time ends the process: nothing has been started,
/// and waiting cannot be interrupted.
pub fn join_ranks(timeout: Duration, interrupt: &Interrupt) -> Result<Ranks> {
    let met = Arc::new(AtomicBool::new(false));
    let (watched, interrupt) = (met.clone(), interrupt.clone());
    std::thread::spawn(move || {
        while !watched.load(Ordering::Relaxed) {
            if let Some(code) = interrupt.exit_code() {
                say("stopped while waiting for the other processes");
                std::process::exit(code.into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let ranks = Ranks::join(timeout);
    met.store(true, Ordering::Relaxed);
    Ok(ranks?)
}
