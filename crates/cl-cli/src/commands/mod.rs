//! The commands, one per file.

pub mod chat;
mod chat_template;
pub mod check;
pub mod compare;
pub mod data;
mod decoding;
pub mod eval;
pub mod generate;
pub mod import_gguf;
mod input;
mod loaded;
pub mod moe;
pub mod paper_tables;
mod prompts;
pub mod publish;
mod reply;
pub mod report;
pub mod reproduce;
pub mod sequence;
pub mod shell;
pub mod study;
pub mod train;

use std::path::{Path, PathBuf};

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_data::Profile;
use cl_hub::{HubArgs, HubError, Names, Part};
use cl_train::{Precision, TrainConfig};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use serde::de::value::StrDeserializer;

/// Reads a configuration file.
pub fn read(path: &Path) -> Result<String> {
    Ok(cl_checkpoint::files::read_text(path, cl_checkpoint::files::MAX_CONFIG)?)
}

/// Puts directories in the place of the names of a model and adapters; with `--hub`, what is not there is downloaded.
fn locate(hub: HubArgs, model: &mut PathBuf, adapters: &mut [PathBuf], interrupt: &Interrupt) -> Result<(), HubError> {
    let names = hub.names(interrupt);
    *model = names.directory(model, Part::Model)?;
    adapters.iter_mut().try_for_each(|dir| locate_adapter(&names, dir))
}

/// The same for an adapter; a mixture of adapters is a local directory.
fn locate_adapter(names: &Names, dir: &mut PathBuf) -> Result<(), HubError> {
    *dir = names.directory(dir, Part::Adapter)?;
    Ok(())
}

/// The same for the model of a configuration, and the adapters that its training starts from or stays orthogonal to.
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

/// Parses a word as configuration files spell it.
pub fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let word = StrDeserializer::<serde::de::value::Error>::new(text);
    T::deserialize(word).map_err(|e| e.to_string())
}

/// Parses `--precision`.
pub fn precision() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(["f32", "bf16"]).try_map(|text| word(&text))
}

/// Parses `--profile`.
pub fn profile() -> impl TypedValueParser<Value = Profile> {
    PossibleValuesParser::new(["method", "paper"]).try_map(|text| word(&text))
}
