//! Task arithmetic: the weighted sum of task vectors, `θ₀ + λ Σ wᵢδᵢ`.
//!
//! Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.

use super::info::MethodInfo;
use super::method::MergeMethod;
use super::settings::TensorSettings;
use super::settings_error::SettingsError;
use super::task_vector_settings::{summed, task_vectors};
use super::task_vectors::Sparsify;

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Task arithmetic",
    paper: "Ilharco et al., arXiv 2212.04089",
    formula: "θ₀ + λ Σ wᵢδᵢ",
    parameters: &["weight", "lambda", "normalize", "divisor", "int8_mask"],
    defaults: summed,
    ..MethodInfo::new("task_arithmetic", build)
};

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    Ok(Box::new(task_vectors(settings, Sparsify::None)?))
}
