//! What a method says of itself, and how it is made of settings.

use cl_checkpoint::Profile;
use std::ops::RangeInclusive;

use super::method::MergeMethod;
use super::parameters::{ParameterInfo, SHARED};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;

/// Whether a method has a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// It needs one.
    Required,
    /// It is about task vectors with one and about models without.
    Optional,
    /// A base is one more input.
    Input,
}

/// Makes the method that merges one tensor; the error says what is missing or wrong in the settings.
pub type Build = fn(&TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError>;

/// One method: what a merge file calls it, what it takes, and how it is made.
#[derive(Clone, Debug)]
pub struct MethodInfo {
    /// Name in files.
    pub name: &'static str,
    /// Name in texts.
    pub title: &'static str,
    /// Where it comes from.
    pub paper: &'static str,
    /// What it computes.
    pub formula: &'static str,
    /// Whether it has a base.
    pub base: Base,
    /// How many models it takes, the base not counted.
    pub models: RangeInclusive<usize>,
    /// Names of its parameters.
    pub parameters: &'static [&'static str],
    /// Those of them that are not in the table of parameters that methods share.
    pub own_parameters: &'static [ParameterInfo],
    /// Whether the order of models means something. Where it does not, models are taken in the order of their names, so that
    /// the order in a file does not change a bit.
    pub ordered: bool,
    /// Whether it decomposes matrices, and allocates large blocks again and again for it.
    pub decomposes: bool,
    /// Whether it merges the updates of adapters too, which have no weights of a base beneath them.
    pub for_updates: bool,
    /// What holds where a file says nothing, by whose definitions hold.
    pub defaults: fn(Profile) -> Defaults,
    /// Makes the method for one tensor.
    pub build: Build,
}

impl MethodInfo {
    /// A method with a base, any number of models and no parameters; other fields are set over it:
    /// `MethodInfo { parameters: &["weight"], ..MethodInfo::new("name", build) }`.
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

    /// One of its parameters by name.
    pub fn parameter(&self, name: &str) -> Option<&'static ParameterInfo> {
        if !self.parameters.contains(&name) {
            return None;
        }
        self.own_parameters.iter().chain(SHARED).find(|info| info.name == name)
    }
}
