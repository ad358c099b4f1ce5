use cl_checkpoint::Profile;
use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, merge_tensor};
use super::parameters::ParameterInfo;
use super::settings::TensorSettings;
use super::settings_error::SettingsError;
use super::svd::{self, Algebra, Step, Triplets};
use super::task_vector_settings::{elected, task_vectors};
use super::task_vectors::{Divisor, Sparsify, TaskVectors};
use crate::Error;
use crate::tensor::{TensorGroup, Values};

/// KnOTS: task vectors are merged in the basis of their joint singular vectors, where they are aligned.
///
/// `[δ₁ … δ_T] = U diag(σ) [V₁ᵀ … V_Tᵀ]`, concatenated along columns; `θ = θ₀ + U diag(σ) M`, where `M` is the merge of
/// the `Vᵢᵀ` by [`Knots::merge`]: TIES in the paper's KnOTS-TIES, the plain mean, or any other merge of task vectors,
/// with its own weights, densities and λ. Tensors that are not matrices are merged directly by that method.
///
/// Stoica et al., "Model merging with SVD to tie the Knots", arXiv 2410.19735.
/// The paper describes the merge of the `Vᵢᵀ`; the authors' configurations merge `diag(σ) Vᵢᵀ` ([`Knots::scaled`]).
/// Both agree if nothing is trimmed, as in these configurations. Their code trims the entries of all layers together,
/// here each tensor is trimmed separately. As in their code, singular values up to 1e-5 are dropped, but relative to
/// the largest if that is below 1. The sign of a singular vector is arbitrary, but matters in TIES if values cancel
/// exactly: the entry of `uᵢ` with the largest magnitude is made positive.
#[derive(Clone, Debug)]
pub struct Knots {
    /// Merge of the `Vᵢᵀ`.
    pub merge: TaskVectors,
    /// Whether to merge `diag(σ) Vᵢᵀ` instead of `Vᵢᵀ`.
    pub scaled: bool,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "KnOTS-TIES",
    paper: "Stoica et al., arXiv 2410.19735",
    formula: "θ₀ + λ U Σ (TIES of Vᵢ)ᵀ, U Σ [V₁ … Vₙ]ᵀ = [δ₁ … δₙ]",
    parameters: &["weight", "density", "lambda", "scaled", "election", "divisor"],
    own_parameters: &[ParameterInfo::choice("scaled", "trim Σ Vᵀ instead of Vᵀ", "true or false")],
    decomposes: true,
    // The same for all profiles: no other tool has this method.
    defaults: |_| elected(Profile::Method, Divisor::Count).with("density", 1.0).with("scaled", false),
    ..MethodInfo::new("knots", build)
};

#[derive(Deserialize)]
struct Settings {
    density: Vec<f64>,
    scaled: bool,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { density, scaled } = settings.read()?;
    Ok(Box::new(Knots { merge: task_vectors(settings, Sparsify::Magnitude { density })?, scaled }))
}

/// Singular values up to this one are dropped in the authors' code.
const LEAST: f64 = 1e-5;

impl MergeMethod for Knots {
    fn task_vectors(&self) -> bool {
        true
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        let Some([rows, columns]) = svd::matrix_shape(group) else { return self.merge.workspace(group) };
        let joint = group.models.len() * columns;
        // In f32: all task vectors, singular vectors and parts, of which two are in memory at a time; the base and a
        // task vector, or the merged parts.
        4 * rows * joint + 4 * rows.min(joint) * (rows + joint) + 16 * rows * columns + svd::scratch(rows, joint)
    }

    fn whole_rows(&self) -> bool {
        self.merge.whole_rows()
    }

    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        svd::cost(group, group.models.len())
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        let algebra = Algebra::new(group, "knots")?;
        if !group.is_matrix() {
            return self.merge.prepare(group);
        }
        let (columns, models) = (group.shape[1], group.models.len());
        let Triplets { mut u, s, v } = self.joint(group, &algebra)?;
        let mut parts = vec![Vec::with_capacity(s.len() * columns); models];
        for (j, &s) in s.iter().enumerate() {
            let column = u.col_as_slice(j);
            let largest = column.iter().fold(0.0, |most: f32, &x| if x.abs() > most.abs() { x } else { most });
            let (sign, s) = (largest.signum(), s as f32);
            let (before, after) = if self.scaled { (sign * s, sign) } else { (sign, sign * s) };
            for (part, v) in parts.iter_mut().zip(v.col_as_slice(j).chunks(columns)) {
                part.extend(v.iter().map(|v| before * v));
            }
            u.col_as_slice_mut(j).iter_mut().for_each(|u| *u *= after);
        }
        drop(v);
        let mut merged = vec![0.0; group.elements()];
        if !s.is_empty() {
            let inner = merge_parts(&self.merge, group, &parts, [s.len(), columns])?;
            let inner = svd::matrix(&inner, &[s.len(), columns]);
            algebra.add_product_f32(svd::matrix_mut(&mut merged, group.shape), 1.0, u.as_ref(), inner);
        }
        Ok(Box::new(Step { values: merged.into(), factor: 1.0 }))
    }
}

impl Knots {
    /// Singular triplets of `[δ₁ … δ_T]`, without those of dropped singular values.
    fn joint(&self, group: &TensorGroup<'_>, algebra: &Algebra<'_>) -> Result<Triplets<f32>, Error> {
        let (columns, joint) = (group.shape[1], group.shape[1] * group.models.len());
        let mut values = vec![0.0f32; group.shape[0] * joint];
        svd::each_task_vector(group, |model, delta| {
            for (row, delta) in values.chunks_mut(joint).zip(delta.chunks(columns)) {
                row[model * columns..][..columns].copy_from_slice(delta);
            }
            Ok(())
        })?;
        let Triplets { mut u, mut s, mut v } = algebra.triplets_f32(svd::matrix(&values, &[group.shape[0], joint]))?;
        let least = LEAST * s.first().map_or(0.0, |s| s.min(1.0));
        s.truncate(s.iter().take_while(|&&s| s > least).count());
        u.truncate(u.nrows(), s.len());
        v.truncate(v.nrows(), s.len());
        Ok(Triplets { u, s, v })
    }
}

/// Merges the tasks' parts as if they were task vectors of a tensor of this shape.
fn merge_parts(
    method: &TaskVectors,
    group: &TensorGroup<'_>,
    parts: &[Vec<f32>],
    shape: [usize; 2],
) -> Result<Vec<f32>, Error> {
    let zeros = vec![0.0; shape[0] * shape[1]];
    let models = group.models.iter().zip(parts).map(|(model, part)| Values::from_slice(model.model(), part)).collect();
    let base = Values::from_slice("zero", &zeros);
    let group = TensorGroup { parallel: group.parallel, ..TensorGroup::new(group.name, &shape, Some(base), models) };
    merge_tensor(method, &group)
}

#[cfg(test)]
mod tests {
    use super::super::svd::testing::{assert_close, merge, random, task_vectors};
    use super::*;
    use crate::methods::{Consensus, Divisor, Rescale, Sign, Sparsify};

    fn ties(models: usize, density: f64) -> TaskVectors {
        TaskVectors {
            weights: vec![1.0; models],
            lambda: 1.0,
            sparsify: Sparsify::Magnitude { density: vec![density; models] },
            rescale: Rescale::None,
            consensus: Some(Consensus { sign: Sign::Sum, weighted: false }),
            divisor: Divisor::Count,
            seed: 0,
        }
    }

    /// ```python
    /// u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    /// def ties(parts):  # the 6 entries of greatest magnitude of each part
    ///     parts = np.stack([np.where(np.abs(p) >= np.sort(np.abs(p).ravel())[-6], p, 0) for p in parts])
    ///     agrees = np.sign(parts) == np.where(parts.sum(0) >= 0, 1, -1)
    ///     return (parts * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    /// u @ np.diag(s) @ ties(np.split(vt, 2, axis=1))
    /// u @ ties(np.split(np.diag(s) @ vt, 2, axis=1))
    /// ```
    #[test]
    fn ties_in_the_joint_basis_as_in_numpy() {
        let deltas = task_vectors([3, 4], 2);
        let expected = [
            -0.772928, 0.523825, -0.07228, 0.092939, -0.315158, 0.164347, -0.554791, 0.119528, 0.286908, -0.46323,
            0.577591, -0.862774,
        ];
        assert_close(&merge(&Knots { merge: ties(2, 0.5), scaled: false }, [3, 4], &deltas), &expected, 1e-5);
        let expected = [
            -0.772928, 0.523825, -0.278252, 0.004676, -0.315158, 0.164347, -0.426199, -0.015664, 0.286908, -0.46323,
            0.573218, -0.680947,
        ];
        assert_close(&merge(&Knots { merge: ties(2, 0.5), scaled: true }, [3, 4], &deltas), &expected, 1e-5);
    }

    /// Linear merges do not depend on the basis. Tests more rows than all columns together, and fewer.
    #[test]
    fn a_mean_in_the_joint_basis_is_the_mean() {
        for shape in [[20, 6], [6, 20]] {
            let deltas = random(shape, 2, 7);
            let mean = TaskVectors { sparsify: Sparsify::None, consensus: None, ..ties(2, 1.0) };
            let expected: Vec<f32> = deltas[0].iter().zip(&deltas[1]).map(|(a, b)| (a + b) / 2.0).collect();
            assert_close(&merge(&Knots { merge: mean, scaled: false }, shape, &deltas), &expected, 1e-6);
        }
    }

    #[test]
    fn opposite_models_do_not_show_the_signs_of_singular_vectors() {
        let delta = &task_vectors([3, 4], 1)[0];
        let opposite: Vec<f32> = delta.iter().map(|x| -x).collect();
        let merged = |models: [&Vec<f32>; 2]| {
            merge(&Knots { merge: ties(2, 1.0), scaled: false }, [3, 4], &models.map(Clone::clone))
        };
        assert_close(&merged([delta, &opposite]), &merged([&opposite, delta]), 1e-6);
    }
}
