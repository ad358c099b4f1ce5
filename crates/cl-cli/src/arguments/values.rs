//! Parsers of values used by several commands.

use std::num::NonZero;

use cl_checkpoint::Precision;
use cl_data::Profile;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use serde::de::value::StrDeserializer;

/// Parses a word as it is spelled in configuration files.
pub(crate) fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let word = StrDeserializer::<serde::de::value::Error>::new(text);
    T::deserialize(word).map_err(|e| e.to_string())
}

/// Parses a number of at least 1.
pub(super) fn at_least_one(text: &str) -> Result<NonZero<usize>, String> {
    text.parse().map_err(|_| "expected an integer of at least 1".to_owned())
}

/// Like [`at_least_one`], as `usize`.
pub(super) fn count(text: &str) -> Result<usize, String> {
    at_least_one(text).map(NonZero::get)
}

/// Parses `--precision`.
pub(super) fn precision() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(["f32", "bf16"]).try_map(|text| word(&text))
}

/// Parses `--profile`.
pub(super) fn profile() -> impl TypedValueParser<Value = Profile> {
    PossibleValuesParser::new(["method", "paper"]).try_map(|text| word(&text))
}
