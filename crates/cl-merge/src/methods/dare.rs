//! DARE: entries of task vectors dropped at random, the others rescaled.
//!
//! Yu et al., "Language Models are Super Mario", arXiv 2311.03099.

use super::info::MethodInfo;
use super::method::MergeMethod;
use super::settings::TensorSettings;
use super::settings_error::SettingsError;
use super::task_vector_settings::{Densities, density, elected, rescale_of_random, summed, task_vectors};
use super::task_vectors::{Divisor, Sparsify};

pub(super) const LINEAR: MethodInfo = MethodInfo {
    title: "DARE",
    paper: "Yu et al., arXiv 2311.03099",
    formula: "θ₀ + λ Σ wᵢ · mask(δᵢ) / density",
    parameters: &["weight", "density", "lambda", "normalize", "rescale", "divisor", "int8_mask"],
    defaults: |profile| summed(profile).with("density", density(profile)).with("rescale", rescale_of_random(profile)),
    ..MethodInfo::new("dare_linear", build)
};

pub(super) const TIES: MethodInfo = MethodInfo {
    title: "DARE-TIES",
    formula: "as dare_linear, with TIES' election",
    parameters: &["weight", "density", "lambda", "normalize", "rescale", "election", "divisor", "int8_mask"],
    defaults: |profile| {
        let elected = elected(profile, Divisor::None);
        elected.with("density", density(profile)).with("rescale", rescale_of_random(profile))
    },
    name: "dare_ties",
    ..LINEAR
};

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Densities { density } = settings.read()?;
    Ok(Box::new(task_vectors(settings, Sparsify::Random { density })?))
}
