//! Parsers of values that several commands take.

use cl_checkpoint::Precision;
use cl_data::Profile;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::DeserializeOwned;
use serde::de::value::StrDeserializer;

/// Parses a word as configuration files spell it.
pub(crate) fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let word = StrDeserializer::<serde::de::value::Error>::new(text);
    T::deserialize(word).map_err(|e| e.to_string())
}

/// Parses `--precision`.
pub(super) fn precision() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(["f32", "bf16"]).try_map(|text| word(&text))
}

/// Parses `--profile`.
pub(super) fn profile() -> impl TypedValueParser<Value = Profile> {
    PossibleValuesParser::new(["method", "paper"]).try_map(|text| word(&text))
}
