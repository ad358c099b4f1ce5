//! Model Breadcrumbs: task vectors without their largest and smallest entries.
//!
//! Davari and Belilovsky, "Model Breadcrumbs", arXiv 2312.06795.

use serde::Deserialize;

use super::info::MethodInfo;
use super::method::MergeMethod;
use super::parameters::{ParameterInfo, SHARE};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::task_vector_settings::{elected, summed, task_vectors};
use super::task_vectors::{Divisor, Rescale, Sparsify};

pub(super) const LINEAR: MethodInfo = MethodInfo {
    title: "Model Breadcrumbs",
    paper: "Davari and Belilovsky, arXiv 2312.06795",
    formula: "θ₀ + λ Σ wᵢ · (δᵢ without its largest and smallest entries)",
    parameters: &["weight", "density", "gamma", "lambda", "normalize", "rescale", "divisor", "int8_mask"],
    own_parameters: &[GAMMA],
    defaults: |profile| kept(summed(profile)),
    ..MethodInfo::new("breadcrumbs", build)
};

pub(super) const TIES: MethodInfo = MethodInfo {
    name: "breadcrumbs_ties",
    title: "Model Breadcrumbs with TIES",
    formula: "as breadcrumbs, with TIES' election",
    parameters: &["weight", "density", "gamma", "lambda", "normalize", "rescale", "election", "divisor", "int8_mask"],
    defaults: |profile| kept(elected(profile, Divisor::None)),
    ..LINEAR
};

const GAMMA: ParameterInfo =
    ParameterInfo::number("gamma", "fraction of a task vector's largest entries to drop", "0 to 1", SHARE).per_model();

#[derive(Deserialize)]
struct Settings {
    density: Vec<f64>,
    gamma: Vec<f64>,
}

fn kept(defaults: Defaults) -> Defaults {
    defaults.with("density", 1.0).with("gamma", 0.01).with("rescale", Rescale::None)
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { density, gamma } = settings.read()?;
    Ok(Box::new(task_vectors(settings, Sparsify::Outliers { density, gamma })?))
}
