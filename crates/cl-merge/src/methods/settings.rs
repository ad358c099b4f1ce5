//! Settings of a method for one tensor, and defaults.

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::opcm_state::OpcmState;
use super::settings_error::SettingsError;

/// Default values of parameters.
#[derive(Clone, Debug, Default)]
pub struct Defaults(pub(crate) Table);

impl Defaults {
    /// No defaults.
    pub fn new() -> Defaults {
        Defaults::default()
    }

    /// Adds a default.
    ///
    /// # Panics
    /// Panics if the value cannot be represented in TOML.
    pub fn with(mut self, name: &str, value: impl Serialize) -> Defaults {
        let value = Value::try_from(value).expect("defaults are numbers, truth values and words");
        self.0.insert(name.to_owned(), value);
        self
    }
}

/// Settings from which a method is constructed for one tensor.
pub struct TensorSettings<'a> {
    /// Parameters by name, with gradients and filters resolved; values of per-model parameters are lists in the order
    /// of models.
    pub(crate) values: Table,
    /// Names of the models, from which their random masks are derived.
    pub models: Vec<&'a str>,
    /// Random seed.
    pub seed: u64,
    /// Result of an earlier merge to continue from.
    pub previous: Option<&'a OpcmState>,
}

impl TensorSettings<'_> {
    /// Reads the parameters into a method's own type, with one field per parameter: `Vec<f64>` if it can be set per
    /// model, otherwise a single value, or an `Option` if it can be absent.
    ///
    /// # Errors
    /// Returns an error if a value is missing or of another type.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, SettingsError> {
        Ok(self.values.clone().try_into()?)
    }
}
