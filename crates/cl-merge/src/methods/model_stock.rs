use serde::Deserialize;

use super::gram::{Gram, Vectors, combine, combine_rows};
use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::parameters::ParameterInfo;
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::TensorGroup;

/// Interpolation between the base and the mean of the models, depending on the agreement of their task vectors:
/// `θ = t · mean(θᵢ) + (1−t) θ₀`, `t = N cos φ / (1 + (N−1) cos φ)`, with `cos φ` the mean cosine between task vectors.
///
/// Jang, Yun and Han, "Model Stock", arXiv 2403.19522. The paper uses layers as vectors. As in mergekit, vectors are
/// tensors here, or rows with `filter_wise`; products of norms below 1e-6 are replaced by 1e-6; and if the divisor is
/// zero, the base is returned.
#[derive(Clone, Debug)]
pub struct ModelStock {
    /// Whether to use one ratio `t` per row (of the last dimension) instead of per tensor.
    pub filter_wise: bool,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Model Stock",
    paper: "Jang et al., arXiv 2403.19522",
    formula: "t · mean + (1−t) θ₀, t = N cos φ / (1 + (N−1) cos φ)",
    parameters: &["filter_wise"],
    own_parameters: &[ParameterInfo::choice("filter_wise", "one ratio per row instead of per tensor", "true or false")],
    models: 2..=usize::MAX,
    defaults: |_| Defaults::new().with("filter_wise", false),
    ..MethodInfo::new("model_stock", build)
};

#[derive(Deserialize)]
struct Settings {
    filter_wise: bool,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { filter_wise } = settings.read()?;
    Ok(Box::new(ModelStock { filter_wise }))
}

impl MergeMethod for ModelStock {
    fn whole_rows(&self) -> bool {
        self.filter_wise
    }

    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() || group.models.len() < 2 {
            return Err(undefined(group, "model_stock", Undefined::NoAngle));
        }
        if self.filter_wise {
            Ok(combine_rows(group.columns(), Vectors::TaskVectors, coefficients))
        } else {
            combine(group, Vectors::TaskVectors, |gram| Ok(coefficients(gram)))
        }
    }
}

fn coefficients(gram: &Gram) -> Vec<f64> {
    let n = gram.size();
    let norms = gram.norms();
    let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
    let cosines = pairs.map(|(i, j)| (gram.dot(i, j) / (norms[i] * norms[j]).max(1e-6)).clamp(-1.0, 1.0));
    let count = n as f64;
    let cosine = cosines.sum::<f64>() / (count * (count - 1.0) / 2.0);
    let divisor = 1.0 + (count - 1.0) * cosine;
    let t = if divisor.abs() < 1e-6 { 0.0 } else { count * cosine / divisor };
    vec![t / count; n]
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    const WHOLE: ModelStock = ModelStock { filter_wise: false };
    const ROWS: ModelStock = ModelStock { filter_wise: true };

    /// ```python
    /// b, x = np.ones(3), np.array([[2., 1, 1], [2, 2, 1], [2, 1, 3]])
    /// u = (x - b) / np.linalg.norm(x - b, axis=1, keepdims=True)
    /// c = np.mean([u[0] @ u[1], u[0] @ u[2], u[1] @ u[2]])
    /// t = 3 * c / (1 + 2 * c)
    /// t * x.mean(0) + (1 - t) * b
    /// ```
    #[test]
    fn known_values() {
        let base: &[f32] = &[1.0, 1.0, 1.0];
        let models: [&[f32]; 3] = [&[2.0, 1.0, 1.0], &[2.0, 2.0, 1.0], &[2.0, 1.0, 3.0]];
        for method in [WHOLE, ROWS] {
            let out = merged(&method, &[3], Some(base), &models).unwrap();
            let near = out.iter().zip([1.742_564, 1.247_521_3, 1.495_042_7]).all(|(x, y)| (x - y).abs() < 1e-6);
            assert!(near, "{out:?}");
        }
    }

    /// Rows at 45° (`2c / (1 + c) = 0.828427`) and at 0° of each other.
    #[test]
    fn every_row_has_its_own_ratio() {
        let models: [&[f32]; 2] = [&[1.0, 0.0, 0.0, 2.0], &[1.0, 1.0, 0.0, 1.0]];
        let out = merged(&ROWS, &[2, 2], Some(&[0.0; 4]), &models).unwrap();
        let near = out.iter().zip([0.828_427_1, 0.414_213_6, 0.0, 1.5]).all(|(x, y)| (x - y).abs() < 1e-6);
        assert!(near, "{out:?}");
    }

    #[test]
    fn agreement_opposition_and_no_change() {
        let base: &[f32] = &[1.0, -2.0];
        for method in [WHOLE, ROWS] {
            let out = |a: &[f32], b: &[f32]| merged(&method, &[2], Some(base), &[a, b]).unwrap();
            assert_eq!(out(base, base), base);
            assert_eq!(out(&[2.0, 3.0], &[2.0, 3.0]), [2.0, 3.0]);
            // For orthogonal task vectors, `t` is zero; for opposite ones, the divisor. Both return the base.
            assert_eq!(out(&[2.0, -2.0], &[1.0, 5.0]), base);
            assert_eq!(out(&[2.0, 0.0], &[0.0, -4.0]), base);
            assert!(merged(&method, &[0], Some(&[]), &[&[], &[]]).unwrap().is_empty());
            assert_eq!(merged(&method, &[], Some(&[1.0]), &[&[3.0], &[5.0]]).unwrap(), [4.0]);
            assert!(merged(&method, &[2], Some(base), &[base]).is_err());
            assert!(merged(&method, &[2], None, &[base, base]).is_err());
        }
    }
}
