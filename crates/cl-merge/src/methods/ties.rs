//! TIES: trims every task vector to its largest entries, and averages those with the elected sign.
//!
//! Yadav et al., "TIES-Merging", arXiv 2306.01708.

use cl_checkpoint::Profile;
use serde::{Deserialize, Serialize};

use super::info::MethodInfo;
use super::method::MergeMethod;
use super::parameters::ParameterInfo;
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::task_vector_settings::{Densities, density, elected, task_vectors};
use super::task_vectors::{Divisor, Rescale, Sparsify};

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "TIES",
    paper: "Yadav et al., arXiv 2306.01708",
    formula: "θ₀ + λ · disjoint mean of the trimmed δᵢ with the elected sign",
    parameters: &["weight", "density", "lambda", "normalize", "rescale", "trim", "election", "divisor", "int8_mask"],
    own_parameters: &[ParameterInfo::choice("trim", "scope of trimming", "tensor, model")],
    defaults,
    ..MethodInfo::new("ties", build)
};

/// Scope of trimming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trimmed {
    /// Each tensor is trimmed separately.
    Tensor,
    /// The whole model is trimmed together.
    Model,
}

fn defaults(profile: Profile) -> Defaults {
    let trim = if profile == Profile::Method { Trimmed::Model } else { Trimmed::Tensor };
    elected(profile, Divisor::Weight)
        .with("density", density(profile))
        .with("rescale", Rescale::None)
        .with("trim", trim)
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Densities { density } = settings.read()?;
    Ok(Box::new(task_vectors(settings, Sparsify::Magnitude { density })?))
}

/// The densities for trimming over the whole model; `None` if these settings do not request it.
pub(crate) fn whole_model_trim(settings: &TensorSettings<'_>) -> Option<Vec<f64>> {
    #[derive(Deserialize)]
    struct Settings {
        trim: Trimmed,
        density: Vec<f64>,
    }
    let settings: Settings = settings.read().ok()?;
    (settings.trim == Trimmed::Model).then_some(settings.density)
}
