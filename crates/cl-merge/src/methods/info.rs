//! Description of a method, and its construction from settings.

use cl_checkpoint::Profile;
use std::ops::RangeInclusive;

use super::method::MergeMethod;
use super::parameters::{ParameterInfo, SHARED};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;

/// Whether and how a method uses a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// A base is required.
    Required,
    /// With a base, the method merges task vectors; without one, models.
    Optional,
    /// A base is an additional input.
    Input,
}

/// Constructs the method for one tensor; returns an error for missing or invalid settings.
pub type Build = fn(&TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError>;

/// Description of a method: name, inputs, parameters and constructor.
#[derive(Clone, Debug)]
pub struct MethodInfo {
    /// Name in merge files.
    pub name: &'static str,
    /// Display name.
    pub title: &'static str,
    /// Paper or other source.
    pub paper: &'static str,
    /// Formula.
    pub formula: &'static str,
    /// Whether and how the method uses a base.
    pub base: Base,
    /// Allowed numbers of models, not counting the base.
    pub models: RangeInclusive<usize>,
    /// Names of the parameters.
    pub parameters: &'static [&'static str],
    /// Parameters that are not in the table of shared parameters.
    pub own_parameters: &'static [ParameterInfo],
    /// Whether the order of models matters. If not, models are sorted by name, so that their order in a file does not
    /// change the result.
    pub ordered: bool,
    /// Whether the method decomposes matrices, which repeatedly allocates large blocks.
    pub decomposes: bool,
    /// Whether the method can also merge adapter updates, without base weights.
    pub for_updates: bool,
    /// Defaults, depending on the profile.
    pub defaults: fn(Profile) -> Defaults,
    /// Constructs the method for one tensor.
    pub build: Build,
}

impl MethodInfo {
    /// A method with a base, any number of models and no parameters; set other fields as in `MethodInfo { parameters:
    /// &["weight"], ..MethodInfo::new("name", build) }`.
    pub const fn new(name: &'static str, build: Build) -> MethodInfo {
        MethodInfo {
            name,
            title: name,
            paper: "",
            formula: "",
            base: Base::Required,
            models: 1..=usize::MAX,
            parameters: &[],
            own_parameters: &[],
            ordered: false,
            decomposes: false,
            for_updates: true,
            defaults: |_| Defaults::new(),
            build,
        }
    }

    /// Returns the parameter with this name, or `None` if the method does not have it.
    pub fn parameter(&self, name: &str) -> Option<&'static ParameterInfo> {
        if !self.parameters.contains(&name) {
            return None;
        }
        self.own_parameters.iter().chain(SHARED).find(|info| info.name == name)
    }
}
