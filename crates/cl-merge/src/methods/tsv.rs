use faer::Mat;
use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces};
use super::parameters::{ParameterInfo, SHARE};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::svd::{self, Algebra, Step, Triplets};
use crate::Error;
use crate::tensor::TensorGroup;

/// TSV-Merge: concatenates the leading singular vectors of the tasks and orthonormalizes them.
///
/// `θ = θ₀ + λ U⊥ diag(s) V⊥ᵀ`, where `U = [U₁ … U_T]` contains the `k` leading left singular vectors of every `δᵢ`,
/// `s` their singular values, and `U⊥` is the matrix with orthonormal columns nearest to `U` (orthogonal Procrustes);
/// `V⊥` likewise. For tensors that are not matrices, λ times the mean of the task vectors is added.
///
/// Gargiulo et al., "Task Singular Vectors", arXiv 2412.00081.
/// The authors' code keeps vectors of zero singular values if a `δᵢ` has a rank below `k`, and completes `U⊥` by
/// arbitrary directions if `U` is rank-deficient, as for equal models. Both depend on rounding and are omitted here:
/// equal models merge to `δ` truncated to rank `k`.
#[derive(Clone, Debug)]
pub struct Tsv {
    /// λ, the scale of the merged task vector.
    pub lambda: f64,
    /// Fraction of each task's singular triplets to keep, in (0, 1]: `k = max(1, ⌊share · min(rows, columns)⌋)`. `None`
    /// divides the triplets among the models: `1 / T`, as in the paper.
    pub rank_share: Option<f64>,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Task Singular Vectors (TSV-Merge)",
    paper: "Gargiulo et al., arXiv 2412.00081",
    formula: "θ₀ + λ U⊥ Σ V⊥ᵀ of the tasks' leading singular vectors, decorrelated",
    parameters: &["lambda", "rank_share"],
    own_parameters: &[ParameterInfo::number(
        "rank_share",
        "fraction of a matrix's rank that each task keeps",
        "0 to 1; default 1 / models",
        SHARE,
    )],
    decomposes: true,
    defaults: |_| Defaults::new().with("lambda", 1.0),
    ..MethodInfo::new("tsv", build)
};

#[derive(Deserialize)]
struct Settings {
    lambda: f32,
    rank_share: Option<f64>,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { lambda, rank_share } = settings.read()?;
    Ok(Box::new(Tsv { lambda: lambda.into(), rank_share }))
}

impl Tsv {
    fn kept(&self, shape: &[usize], models: usize) -> usize {
        let all = shape.iter().copied().min().unwrap_or(0);
        let kept = self.rank_share.map_or(all / models.max(1), |share| (share * all as f64) as usize);
        kept.clamp(1, all.max(1))
    }
}

impl MergeMethod for Tsv {
    fn task_vectors(&self) -> bool {
        true
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        let Some([rows, columns]) = svd::matrix_shape(group) else { return 0 };
        let models = group.models.len();
        let kept = self.kept(group.shape, models) * models;
        let widest = kept.max(rows.min(columns)).min(rows.max(columns));
        // The base and a task vector, or the result in f64 and f32; the singular vectors before and after
        // orthonormalization.
        12 * rows * columns + 8 * 2 * kept * (rows + columns) + svd::scratch(widest, widest)
    }

    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        svd::cost(group, group.models.len())
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        let algebra = Algebra::new(group, "tsv")?;
        let (shape, models) = (group.shape, group.models.len());
        if !group.is_matrix() {
            return Ok(Box::new(svd::add_sum(self.lambda / models as f64)));
        }
        let mut tasks = Vec::new();
        svd::each_task_vector(group, |_, delta| {
            tasks.push(algebra.leading(svd::matrix(delta, shape), self.kept(shape, models))?);
            Ok(())
        })?;
        let Triplets { mut u, s, mut v } = side_by_side(tasks, shape);
        u = algebra.polar(u.as_ref())?.0;
        v = algebra.polar(v.as_ref())?.0;
        for (j, s) in s.iter().enumerate() {
            u.col_as_slice_mut(j).iter_mut().for_each(|u| *u *= s);
        }
        let mut merged = vec![0.0; group.elements()];
        algebra.add_product(svd::matrix_mut(&mut merged, shape), 1.0, u.as_ref(), v.transpose());
        Ok(Box::new(Step { values: svd::rounded(&merged).into(), factor: self.lambda }))
    }
}

/// Concatenates the singular triplets of all tasks, with the vectors as columns side by side.
pub(super) fn side_by_side(tasks: Vec<Triplets>, shape: &[usize]) -> Triplets {
    let places: Vec<(usize, usize)> =
        tasks.iter().enumerate().flat_map(|(t, task)| (0..task.s.len()).map(move |j| (t, j))).collect();
    Triplets {
        u: Mat::from_fn(shape[0], places.len(), |i, j| tasks[places[j].0].u[(i, places[j].1)]),
        s: places.iter().map(|&(t, j)| tasks[t].s[j]).collect(),
        v: Mat::from_fn(shape[1], places.len(), |i, j| tasks[places[j].0].v[(i, places[j].1)]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::svd::testing::{assert_close, merge, outer, task_vectors, with_group};
    use super::*;
    use crate::methods::merge_tensor;

    /// ```python
    /// svd = lambda a: np.linalg.svd(a, full_matrices=False)
    /// polar = lambda a: svd(a)[0] @ svd(a)[2]
    /// u, s, vt = zip(*(svd(d) for d in deltas))
    /// u, s, vt = np.hstack([x[:, :k] for x in u]), np.hstack([x[:k] for x in s]), np.vstack([x[:k] for x in vt])
    /// (polar(u) * s) @ polar(vt)
    /// ```
    #[test]
    fn singular_vectors_are_decorrelated_as_in_numpy() {
        let deltas = task_vectors([3, 4], 2);
        // k = 1
        let expected = [
            -0.386431, 0.018919, 0.263204, 0.249003, -0.55337, 0.675547, -1.073558, 0.503687, 0.752965, -0.205596,
            -0.135436, -0.523465,
        ];
        assert_close(&merge(&Tsv { lambda: 1.0, rank_share: None }, [3, 4], &deltas), &expected, 1e-5);
        // k = 2: four vectors in three dimensions
        let expected = [
            -0.695484, 0.203952, -0.015965, 0.009187, -0.532042, 0.414071, -1.149145, 0.631085, 0.512679, -0.022372,
            -0.287598, -0.743135,
        ];
        assert_close(&merge(&Tsv { lambda: 1.0, rank_share: Some(0.67) }, [3, 4], &deltas), &expected, 1e-5);
    }

    #[test]
    fn the_order_of_models_does_not_matter() {
        let deltas = task_vectors([7, 5], 3);
        let reversed: Vec<_> = deltas.iter().rev().cloned().collect();
        let tsv = Tsv { lambda: 1.0, rank_share: None };
        assert_close(&merge(&tsv, [7, 5], &deltas), &merge(&tsv, [7, 5], &reversed), 1e-6);
    }

    #[test]
    fn equal_models_keep_their_leading_triplets() {
        // Rank one, which is less than the two triplets that each task may keep.
        let delta = outer(&[1.0, 2.0, -1.0, 0.5], &[0.5, -1.0, 0.25, 2.0]);
        let tsv = Tsv { lambda: 0.5, rank_share: None };
        let half: Vec<f32> = delta.iter().map(|x| x / 2.0).collect();
        assert_close(&merge(&tsv, [4, 4], &[delta.clone(), delta]), &half, 1e-6);
    }

    #[test]
    fn a_vector_gets_the_mean() {
        let merged = with_group(&[3], &[vec![1.0, 2.0, 3.0], vec![3.0, 0.0, 3.0]], false, |group| {
            merge_tensor(&Tsv { lambda: 0.5, rank_share: None }, group).unwrap()
        });
        assert_eq!(merged, [1.0, 0.5, 1.5]);
    }
}
