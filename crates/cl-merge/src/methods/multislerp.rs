use serde::Deserialize;

use super::gram::{Gram, Vectors, combine};
use super::info::{Base, MethodInfo};
use super::method::{MergeMethod, MergePieces, one_per_model, undefined};
use super::parameters::ParameterInfo;
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup};

/// Weighted mean direction of models, or of their task vectors with a base, times their weighted mean norm: `m / ‖m‖ ·
/// Σ wᵢ ‖vᵢ‖` with `m = Σ wᵢ vᵢ / ‖vᵢ‖`, plus the base; tensors are treated as vectors.
///
/// Goddard, <https://goddard.blog/posts/multislerp-wow-what-a-cool-idea>, mergekit's `multislerp`. The original
/// description continues from `m / ‖m‖` with one step in the tangent space, along `Σ wᵢ (uᵢ − (uᵢ·m) m / ‖m‖²)` with
/// unit vectors `uᵢ`. That sum is zero, since `Σ wᵢ uᵢ` is `m` itself, so the step only adds rounding errors and is
/// omitted. A single model is returned unchanged.
#[derive(Clone, Debug)]
pub struct MultiSlerp {
    /// One weight per model.
    pub weights: Vec<f64>,
    /// Whether to divide the weights by their sum, which then must not be zero.
    pub normalize_weights: bool,
    /// Added to norms before division, and the norm of `m` up to which its direction is undefined; at least 0, 1e-8 in
    /// mergekit.
    pub eps: f64,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Multi-SLERP",
    paper: "Goddard 2024, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    formula: "weighted mean on the sphere by one step in the tangent space",
    parameters: &["weight", "normalize_weights", "eps"],
    own_parameters: &[
        ParameterInfo::choice("normalize_weights", "normalize weights to a sum of 1", "true or false"),
        ParameterInfo::number("eps", "smallest norm, against division by zero", "above 0", (0.0, f64::MAX)),
    ],
    base: Base::Optional,
    defaults: |_| Defaults::new().with("weight", 1.0).with("normalize_weights", true).with("eps", 1e-8),
    ..MethodInfo::new("multislerp", build)
};

#[derive(Deserialize)]
struct Settings {
    weight: Vec<f64>,
    normalize_weights: bool,
    eps: f64,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { weight: weights, normalize_weights, eps } = settings.read()?;
    Ok(Box::new(MultiSlerp { weights, normalize_weights, eps }))
}

impl MergeMethod for MultiSlerp {
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        one_per_model(group, "multislerp", "weights", &self.weights)?;
        if group.models.len() == 1 {
            return Ok(Box::new(|piece: &mut Piece, out: &mut [f32]| out.copy_from_slice(&piece.models[0])));
        }
        let total: f64 = self.weights.iter().sum();
        if self.normalize_weights && total == 0.0 {
            let kind = SettingsError::WeightsSumToZero { switch: "normalize_weights" };
            return Err(undefined(group, "multislerp", kind.into()));
        }
        let total = if self.normalize_weights { total } else { 1.0 };
        let weights: Vec<f64> = self.weights.iter().map(|w| w / total).collect();
        combine(group, Vectors::of(group), |gram| {
            let cancel = || undefined(group, "multislerp", Undefined::DirectionsCancel);
            coefficients(gram, &weights, self.eps).ok_or_else(cancel)
        })
    }
}

fn coefficients(gram: &Gram, weights: &[f64], eps: f64) -> Option<Vec<f64>> {
    let norms = gram.norms();
    let unit = |(w, norm): (&f64, &f64)| if *norm > 0.0 { w / (norm + eps) } else { 0.0 };
    let mean: Vec<f64> = weights.iter().zip(&norms).map(unit).collect();
    let length = gram.norm_with(&mean);
    // Unit vectors in f32 are accurate to about 1e-7, and so is their sum if they cancel out.
    if length <= eps || length < 1e-7 * weights.iter().map(|w| w.abs()).sum::<f64>() {
        // If all vectors are zero, for example because no model changed the tensor, no direction is needed.
        let linear = weights.len() == 2 || norms.iter().all(|&norm| norm == 0.0);
        return linear.then(|| weights.to_vec());
    }
    let norm: f64 = weights.iter().zip(&norms).map(|(w, norm)| w * norm).sum();
    Some(mean.into_iter().map(|c| c * norm / length).collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    fn multislerp(weights: &[f64]) -> MultiSlerp {
        MultiSlerp { weights: weights.to_vec(), normalize_weights: true, eps: 1e-8 }
    }

    fn close(out: &[f32], expected: &[f32]) {
        let near = out.len() == expected.len() && out.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6);
        assert!(near, "{out:?} {expected:?}");
    }

    /// ```python
    /// def multislerp(x, w):
    ///     n = np.linalg.norm(x, axis=1)
    ///     m = w @ (x / n[:, None])
    ///     return m / np.linalg.norm(m) * (w @ n)
    /// x, w = np.array([[3., 0, 4], [0, 2, 0], [1, 2, 2]]), np.array([.25, .5, .25])
    /// multislerp(x, w), multislerp(x - 1, w) + 1
    /// ```
    #[test]
    fn known_values() {
        let models: [&[f32]; 3] = [&[3.0, 0.0, 4.0], &[0.0, 2.0, 0.0], &[1.0, 2.0, 2.0]];
        let method = multislerp(&[1.0, 2.0, 1.0]);
        close(&merged(&method, &[3], None, &models).unwrap(), &[0.879_593_2, 2.513_123_5, 1.382_217_9]);
        let out = merged(&method, &[3], Some(&[1.0, 1.0, 1.0]), &models).unwrap();
        close(&out, &[0.235_066_1, 2.966_729_2, 1.436_861_5]);
        // Weights that are not normalised scale the result.
        let method = MultiSlerp { normalize_weights: false, ..method };
        let expected = [0.879_593_2, 2.513_123_5, 1.382_217_9].map(|x| 4.0 * x);
        close(&merged(&method, &[3], None, &models).unwrap(), &expected);
    }

    #[test]
    fn equal_zero_single_and_empty() {
        let (x, zero): ([f32; 3], _) = ([0.1, -0.7, 0.3], [0.0; 3]);
        let method = multislerp(&[0.2, 0.9, 0.5]);
        close(&merged(&method, &[3], None, &[&x, &x, &x]).unwrap(), &x);
        // No model changed the tensor.
        assert_eq!(merged(&method, &[3], Some(&x), &[&x, &x, &x]).unwrap(), x);
        // A zero vector has no direction, but contributes to the mean norm.
        close(&merged(&multislerp(&[1.0, 1.0]), &[3], None, &[&x, &zero]).unwrap(), &x.map(|x| x / 2.0));
        assert_eq!(merged(&multislerp(&[5.0]), &[3], Some(&zero), &[&x]).unwrap(), x);
        assert!(merged(&method, &[0], None, &[&[], &[], &[]]).unwrap().is_empty());
        let exact = MultiSlerp { eps: 0.0, ..method };
        assert_eq!(merged(&exact, &[3], Some(&x), &[&x, &x, &x]).unwrap(), x);
    }

    #[test]
    fn opposite_models() {
        let a: &[f32] = &[1.0, 2.0];
        let b: &[f32] = &[-3.0, -6.0];
        // Two are interpolated linearly.
        assert_eq!(merged(&multislerp(&[1.0, 1.0]), &[2], None, &[a, b]).unwrap(), [-1.0, -2.0]);
        assert_eq!(merged(&multislerp(&[1.0, 1.0]), &[2], Some(&[0.0, 1.0]), &[a, &[-1.0, 0.0]]).unwrap(), [0.0, 1.0]);
        // Three directions at 120° of each other.
        let models: [&[f32]; 3] = [&[1.0, 0.0], &[-0.5, 0.75f32.sqrt()], &[-0.5, -(0.75f32.sqrt())]];
        let error = merged(&multislerp(&[1.0, 1.0, 1.0]), &[2], None, &models).unwrap_err();
        assert!(error.to_string().contains("cancel out"), "{error}");
        assert!(merged(&multislerp(&[1.0, -1.0]), &[2], None, &[a, b]).is_err());
    }
}
