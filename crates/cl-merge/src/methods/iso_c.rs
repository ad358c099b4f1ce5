use faer::MatRef;
use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces};
use super::parameters::{ParameterInfo, SHARE};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::svd::{self, Algebra, Step, Triplets};
use super::tsv::side_by_side;
use crate::Error;
use crate::tensor::TensorGroup;

/// Iso-C: the sum of task vectors with all singular values set to their mean.
///
/// `θ = θ₀ + λ · mean(σ) · U Vᵀ` with `Σ δᵢ = U diag(σ) Vᵀ`. For tensors that are not matrices, λ times the mean of the
/// task vectors is added.
///
/// Marczak et al., "No Task Left Behind", arXiv 2502.04959.
/// If the sum is rank-deficient, its null space is left out and the mean is over the rank, which preserves the sum of
/// singular values; the authors' code gives directions that are only rounding noise the same weight as all others.
#[derive(Clone, Debug)]
pub struct IsoC {
    /// λ, the scale of the merged task vector.
    pub lambda: f64,
}

/// Iso-CTS: as [`IsoC`], but the weakest singular vectors of the sum are replaced by the leading ones of each task
/// outside the common subspace.
///
/// Of `r = min(rows, columns)` directions, every task gets `k = round((r − ⌊common_share · r⌋) / T)`: the leading
/// triplets of `δᵢ − U U ᵀδᵢ`, where `U` contains the leading `r − T k` left singular vectors of `Σ δᵢ`. These and the
/// tasks' vectors are orthonormalized as in [`crate::methods::Tsv`], and every singular value is the mean of all of
/// them.
///
/// Marczak et al., "No Task Left Behind", arXiv 2502.04959, with the authors' code for the rounding.
#[derive(Clone, Debug)]
pub struct IsoCts {
    /// λ, the scale of the merged task vector.
    pub lambda: f64,
    /// Fraction of directions that the sum keeps, in [0, 1]; 0.8 in the paper.
    pub common_share: f64,
}

pub(super) const ISO_C: MethodInfo = MethodInfo {
    title: "Iso-C",
    paper: "Marczak et al., arXiv 2502.04959",
    formula: "θ₀ + λ · mean(σ) U Vᵀ, U Σ Vᵀ = Σ δᵢ",
    parameters: &["lambda"],
    decomposes: true,
    defaults: |_| Defaults::new().with("lambda", 1.0),
    ..MethodInfo::new("iso_c", build_c)
};

pub(super) const ISO_CTS: MethodInfo = MethodInfo {
    title: "Iso-CTS",
    paper: "Marczak et al., arXiv 2502.04959",
    formula: "as iso_c, with the tasks' own directions in place of the least common ones",
    parameters: &["lambda", "common_share"],
    own_parameters: &[ParameterInfo::number(
        "common_share",
        "fraction of directions that the sum of task vectors keeps",
        "0 to 1",
        SHARE,
    )],
    decomposes: true,
    defaults: |_| Defaults::new().with("lambda", 1.0).with("common_share", 0.8),
    ..MethodInfo::new("iso_cts", build_cts)
};

#[derive(Deserialize)]
struct Settings {
    lambda: f32,
    common_share: Option<f64>,
}

fn build_c(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { lambda, .. } = settings.read()?;
    Ok(Box::new(IsoC { lambda: lambda.into() }))
}

fn build_cts(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { lambda, common_share } = settings.read()?;
    Ok(Box::new(IsoCts { lambda: lambda.into(), common_share: common_share.unwrap_or(0.8) }))
}

impl MergeMethod for IsoC {
    fn task_vectors(&self) -> bool {
        true
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        let Some([rows, columns]) = svd::matrix_shape(group) else { return 0 };
        // The sum and its polar factor in f64, the result in f32.
        20 * rows * columns + svd::scratch(rows, columns)
    }

    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        svd::cost(group, 1)
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        let algebra = Algebra::new(group, "iso_c")?;
        if !group.is_matrix() {
            return Ok(Box::new(svd::add_sum(self.lambda / group.models.len() as f64)));
        }
        let sum = sum(group)?;
        let (factor, s) = algebra.polar(svd::matrix(&sum, group.shape))?;
        Ok(Box::new(Step { values: scaled(factor.as_ref(), mean(&s)).into(), factor: self.lambda }))
    }
}

impl MergeMethod for IsoCts {
    fn task_vectors(&self) -> bool {
        true
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        let Some([rows, columns]) = svd::matrix_shape(group) else { return 0 };
        let vectors = rows.min(columns) * (rows + columns);
        // The base, a task vector and, in f64, its component outside the common subspace; singular vectors of the sum
        // and of the tasks.
        16 * rows * columns + 8 * 3 * vectors + svd::scratch(rows, columns)
    }

    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        svd::cost(group, group.models.len() + 1)
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        let algebra = Algebra::new(group, "iso_cts")?;
        let (shape, models) = (group.shape, group.models.len());
        if !group.is_matrix() {
            return Ok(Box::new(svd::add_sum(self.lambda / models as f64)));
        }
        let all = shape[0].min(shape[1]);
        let specific = all - (all as f64 * self.common_share.clamp(0.0, 1.0)) as usize;
        let kept = ((specific as f64 / models as f64).round_ties_even() as usize).min(all / models);
        let common = algebra.triplets(svd::matrix(&sum(group)?, shape), all - models * kept)?;
        let mut parts = Vec::new();
        svd::each_task_vector(group, |_, delta| {
            let within = algebra.product(common.u.transpose(), svd::matrix(delta, shape));
            let mut outside: Vec<f64> = delta.iter().map(|&d| d.into()).collect();
            algebra.add_product(svd::matrix_mut(&mut outside, shape), -1.0, common.u.as_ref(), within.as_ref());
            parts.push(algebra.triplets(svd::matrix(&outside, shape), kept)?);
            Ok(())
        })?;
        parts.push(common);
        let Triplets { mut u, s, mut v } = side_by_side(parts, shape);
        u = algebra.polar(u.as_ref())?.0;
        v = algebra.polar(v.as_ref())?.0;
        let product = algebra.product(u.as_ref(), v.transpose());
        Ok(Box::new(Step { values: scaled(product.as_ref(), mean(&s)).into(), factor: self.lambda }))
    }
}

/// `Σ δᵢ` in f64, because its smallest singular values get the same weight as the largest.
fn sum(group: &TensorGroup<'_>) -> Result<Vec<f64>, Error> {
    let mut sum = vec![0.0; group.elements()];
    svd::each_task_vector(group, |_, delta| {
        sum.iter_mut().zip(delta).for_each(|(sum, &d)| *sum += f64::from(d));
        Ok(())
    })?;
    Ok(sum)
}

fn mean(s: &[f64]) -> f64 {
    s.iter().sum::<f64>() / s.len().max(1) as f64
}

/// A matrix times a factor, row-major and rounded to f32.
fn scaled(a: MatRef<'_, f64>, factor: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(a.nrows() * a.ncols());
    (0..a.nrows()).for_each(|i| values.extend(a.row(i).iter().map(|v| (factor * v) as f32)));
    values
}

#[cfg(test)]
mod tests {
    use super::super::svd::testing::{assert_close, merge, outer, task_vectors};
    use super::*;

    /// ```python
    /// u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    /// s.mean() * u @ vt
    /// ```
    #[test]
    fn the_spectrum_is_flat_as_in_numpy() {
        let expected = [
            -0.875775, 0.093847, 0.244048, -0.394374, -0.145404, 0.769628, -0.599276, 0.135194, 0.404912, 0.190066,
            -0.05439, -0.887605,
        ];
        assert_close(&merge(&IsoC { lambda: 1.0 }, [3, 4], &task_vectors([3, 4], 2)), &expected, 1e-5);
    }

    /// ```python
    /// u, s, vt = svd(sum(deltas))
    /// common = u[:, :1]  # of 3 directions, 3 - ⌊0.4 · 3⌋ = 2 are the tasks', one each
    /// parts = [svd(d - common @ (common.T @ d)) for d in deltas]
    /// u = np.hstack([p[0][:, :1] for p in parts] + [common])
    /// s = np.hstack([p[1][:1] for p in parts] + [s[:1]])
    /// vt = np.vstack([p[2][:1] for p in parts] + [vt[:1]])
    /// s.mean() * polar(u) @ polar(vt)
    /// ```
    #[test]
    fn tasks_get_directions_of_their_own_as_in_numpy() {
        let expected = [
            -0.874976, 0.246594, 0.223335, -0.351287, -0.161144, 0.648396, -0.239641, 0.704174, 0.43774, 0.718688,
            0.081983, -0.533688,
        ];
        let iso_cts = IsoCts { lambda: 1.0, common_share: 0.4 };
        assert_close(&merge(&iso_cts, [3, 4], &task_vectors([3, 4], 2)), &expected, 1e-5);
    }

    #[test]
    fn with_everything_common_both_agree() {
        let deltas = task_vectors([6, 4], 2);
        let cts = merge(&IsoCts { lambda: 0.7, common_share: 1.0 }, [6, 4], &deltas);
        assert_close(&cts, &merge(&IsoC { lambda: 0.7 }, [6, 4], &deltas), 1e-6);
    }

    #[test]
    fn the_null_space_gets_nothing() {
        let delta = outer(&[1.0, -2.0, 3.0], &[0.5, 0.25, -1.0, 2.0]);
        let twice: Vec<f32> = delta.iter().map(|x| 2.0 * x).collect();
        assert_close(&merge(&IsoC { lambda: 1.0 }, [3, 4], &[delta.clone(), delta]), &twice, 1e-6);
    }
}
