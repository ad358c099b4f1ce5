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
mod reply;
pub mod report;
pub mod reproduce;
pub mod sequence;
pub mod shell;
pub mod study;
pub mod train;

use std::path::Path;

use anyhow::Result;
use cl_data::Profile;
use cl_train::Precision;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use serde::de::value::StrDeserializer;

/// Reads a configuration file.
pub fn read(path: &Path) -> Result<String> {
    Ok(cl_checkpoint::files::read_text(path, cl_checkpoint::files::MAX_CONFIG)?)
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
