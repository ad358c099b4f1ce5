//! DELLA: entries of task vectors dropped at random, small ones more often.
//!
//! Deep et al., "DELLA-Merging", arXiv 2406.11617.

use serde::Deserialize;

use super::info::MethodInfo;
use super::method::MergeMethod;
use super::parameters::{ParameterInfo, SHARE};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::task_vector_settings::{elected, rescale_of_random, summed, task_vectors};
use super::task_vectors::{Divisor, Rescale, Sparsify};

pub(super) const TIES: MethodInfo = MethodInfo {
    title: "DELLA",
    paper: "Deep et al., arXiv 2406.11617",
    formula: "as dare_ties, kept with a probability by the rank of the magnitude in its row",
    parameters: &["weight", "density", "epsilon", "lambda", "normalize", "rescale", "election", "divisor", "int8_mask"],
    own_parameters: &[EPSILON],
    defaults: |profile| kept(elected(profile, Divisor::Weight), rescale_of_random(profile)),
    ..MethodInfo::new("della", build)
};

pub(super) const LINEAR: MethodInfo = MethodInfo {
    name: "della_linear",
    title: "DELLA, linear",
    formula: "as della, without an election",
    parameters: &["weight", "density", "epsilon", "lambda", "normalize", "rescale", "divisor", "int8_mask"],
    defaults: |profile| kept(summed(profile), rescale_of_random(profile)),
    ..TIES
};

const EPSILON: ParameterInfo = ParameterInfo::number(
    "epsilon",
    "half of the range of keep probabilities around density",
    "0 to 1, density ± epsilon within 0 to 1",
    SHARE,
)
.per_model();

#[derive(Deserialize)]
struct Settings {
    density: Vec<f64>,
    epsilon: Vec<f64>,
}

fn kept(defaults: Defaults, rescale: Rescale) -> Defaults {
    defaults.with("density", 1.0).with("epsilon", 0.15).with("rescale", rescale)
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { density, epsilon } = settings.read()?;
    for (d, e) in density.iter().zip(&epsilon) {
        if *d > 0.0 && *d < 1.0 && !(d - e > 0.0 && d + e < 1.0) {
            return Err(SettingsError::DensitySpan { density: *d, epsilon: *e });
        }
    }
    Ok(Box::new(task_vectors(settings, Sparsify::Ranked { density, epsilon })?))
}
