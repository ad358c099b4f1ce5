//! Settings as methods get them: what holds for one tensor, and what holds where a file says nothing.

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::opcm_state::OpcmState;
use super::settings_error::SettingsError;

/// Values of parameters that hold where a file says nothing.
#[derive(Clone, Debug, Default)]
pub struct Defaults(pub(crate) Table);

impl Defaults {
    /// None.
    pub fn new() -> Defaults {
        Defaults::default()
    }

    /// With one more.
    ///
    /// # Panics
    /// Panics if TOML has no form for the value.
    pub fn with(mut self, name: &str, value: impl Serialize) -> Defaults {
        let value = Value::try_from(value).expect("defaults are numbers, truth values and words");
        self.0.insert(name.to_owned(), value);
        self
    }
}

/// What a method is made of for one tensor.
pub struct TensorSettings<'a> {
    /// Parameters by name, gradients and filters resolved; what each model can have of its own is a list in the order of models.
    pub(crate) values: Table,
    /// The models' names, which key their random masks.
    pub models: Vec<&'a str>,
    /// Random seed.
    pub seed: u64,
    /// Where an earlier merge ended that this one goes on from.
    pub previous: Option<&'a OpcmState>,
}

impl TensorSettings<'_> {
    /// The parameters as a method's own type, with one field a parameter: `Vec<f64>` where each model can have its own, else
    /// one value; an `Option` where there may be none.
    ///
    /// # Errors
    /// Returns an error if a value is missing or of another type.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, SettingsError> {
        Ok(self.values.clone().try_into()?)
    }
}
