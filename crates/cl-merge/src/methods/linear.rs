use serde::Deserialize;

use super::info::{Base, MethodInfo};
use super::method::{MergeMethod, MergePieces, one_per_model, undefined};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// Weighted sum of models: `Σ wᵢ θᵢ`, divided by `Σ wᵢ` if `normalize` is set; with equal weights, the average.
///
/// Wortsman et al., "Model soups", arXiv 2203.05482.
pub struct Linear {
    /// One weight per model.
    pub weights: Vec<f32>,
    /// Whether to divide by the sum of weights, which then must not be zero.
    pub normalize: bool,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Linear",
    paper: "Wortsman et al., arXiv 2203.05482",
    formula: "Σ wᵢθᵢ / Σ wᵢ",
    parameters: &["weight", "normalize"],
    base: Base::Input,
    defaults: |_| Defaults::new().with("weight", 1.0).with("normalize", true),
    ..MethodInfo::new("linear", build)
};

#[derive(Deserialize)]
struct Settings {
    weight: Vec<f32>,
    normalize: bool,
}

/// The error for weights that cannot be divided by their sum, because it is zero.
const NO_SUM: SettingsError = SettingsError::WeightsSumToZero { switch: "normalize" };

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { weight: weights, normalize } = settings.read()?;
    if normalize && weights.iter().sum::<f32>() == 0.0 {
        return Err(NO_SUM);
    }
    Ok(Box::new(Linear { weights, normalize }))
}

impl MergeMethod for Linear {
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        one_per_model(group, "linear", "weights", &self.weights)?;
        let total: f32 = self.weights.iter().sum();
        if self.normalize && total == 0.0 {
            return Err(undefined(group, "linear", NO_SUM.into()));
        }
        // Divides the sum and not the weights, because rounded weights could change a value that is the same in all
        // models.
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
            for (weight, model) in self.weights.iter().zip(&piece.models) {
                kernels::add_scaled(out, *weight, model);
            }
            if self.normalize && total != 1.0 {
                kernels::divide_by(out, total);
            }
        }))
    }
}
