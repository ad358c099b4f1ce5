use serde::{Deserialize, Serialize};

use super::info::MethodInfo;
use super::method::{Measured, MergeMethod, MergePieces, undefined};
use super::opcm_state::{OpcmNorms, OpcmState, OpcmTensor};
use super::parameters::{ParameterInfo, SHARE};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::svd::{self, Algebra, Step, Triplets};
use super::ties::Trimmed;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// OPCM: merges models one after another and projects directions of the previous merge out of each new task vector.
///
/// `S₁ = δ₁`, `Sₜ = Sₜ₋₁ + P(δₜ)`, `θ = θ₀ + S_T / λ_T` with `λ_T = ‖S_T‖ / mean(‖δ₁‖ … ‖δ_T‖)`: the merge has the same
/// distance from the base as its models on average. With `Sₜ₋₁ = U diag(σ) Vᵀ`, `P` removes the component selected by
/// [`Projection`] and every `uᵢ (uᵢᵀ δₜ vᵢ) vᵢᵀ` from `δₜ`. Tensors that are not matrices are not projected.
///
/// Tang et al., "Merging Models on the Fly Without Retraining", arXiv 2501.09522.
/// In the paper and its code, norms are over the whole model, so there is one λ for all tensors ([`Opcm::norms`]); a
/// tensor merged alone has its own. Directions in which `Sₜ₋₁` is zero are not projected out; the code projects out
/// directions that are only rounding noise.
#[derive(Clone, Debug)]
pub struct Opcm {
    /// Maximum fraction of the sum of singular values, in [0, 1], for the leading singular vectors; 0.5 in the paper.
    /// At 1, the authors' code protects only the diagonal, this implementation everything.
    pub alpha: f64,
    /// Component to remove in addition to the diagonal.
    pub projection: Projection,
    /// Result of an earlier merge. The first model is then that merge, and the others are new.
    pub previous: Option<OpcmState>,
    /// Whether one λ is used for the whole model. If so, [`MergeMethod::measure`] returns the norms of each tensor, and
    /// [`MergeMethod::with_norms`] takes their sum.
    pub over_model: bool,
    /// Norms over the whole model: the sum of the results of [`Opcm::measure`] for all tensors.
    pub norms: Option<OpcmNorms>,
}

/// Component of `C = Uᵀ δ V` to remove, where the leading `r` singular values sum to at most `alpha` of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// `Cᵢⱼ` with `i ≤ r` and `j ≤ r`: within the leading directions (the authors' code).
    #[default]
    Leading,
    /// `Cᵢⱼ` with `i ≤ r` or `j ≤ r`: everything that touches the leading directions (the paper's sum over `i, j > r`).
    Complement,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "OPCM",
    paper: "Tang et al., arXiv 2501.09522",
    formula: "one model after another, each δ projected off those before it, at a constant norm",
    parameters: &["alpha", "projection", "norms", "previous"],
    own_parameters: &[
        ParameterInfo::number(
            "alpha",
            "fraction of the sum of singular values that defines the subspace of earlier tasks",
            "0 to 1",
            SHARE,
        ),
        ParameterInfo::choice(
            "projection",
            "component to remove: leading (within the leading directions), complement (everything that touches them)",
            "leading, complement",
        ),
        ParameterInfo::choice("norms", "scope of the norms for scaling", "model, tensor"),
        ParameterInfo::choice("previous", "directory of an earlier merge to continue from", "a path"),
    ],
    ordered: true,
    decomposes: true,
    for_updates: false,
    defaults: |_| {
        let defaults = Defaults::new().with("alpha", 0.5).with("projection", Projection::Leading);
        defaults.with("norms", Trimmed::Model)
    },
    ..MethodInfo::new("opcm", build)
};

#[derive(Deserialize)]
struct Settings {
    alpha: f64,
    projection: Projection,
    norms: Trimmed,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { alpha, projection, norms } = settings.read()?;
    let (previous, over_model) = (settings.previous.cloned(), norms == Trimmed::Model);
    Ok(Box::new(Opcm { alpha, projection, previous, over_model, norms: None }))
}

impl MergeMethod for Opcm {
    fn task_vectors(&self) -> bool {
        true
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        let Some([rows, columns]) = svd::matrix_shape(group) else { return 0 };
        let short = rows.min(columns);
        // The sum in f64 and f32, the base, the task vector before and after projection; singular vectors and
        // coordinates.
        24 * rows * columns
            + 4 * short * (rows + columns)
            + svd::scratch(rows, columns).max(4 * short * (2 * columns + short))
    }

    fn cost(&self, group: &TensorGroup<'_>) -> f64 {
        svd::cost(group, group.models.len())
    }

    fn kept(&self, group: &TensorGroup<'_>) -> usize {
        if self.over_model && group.is_matrix() { 4 * group.elements() } else { 0 }
    }

    fn measure(&self, group: &TensorGroup<'_>, keep: bool) -> Result<Option<Measured>, Error> {
        if !self.over_model {
            return Ok(None);
        }
        if !group.is_matrix() {
            return Ok(Some(Measured { norms: Opcm::measure(self, group)?, kept: None }));
        }
        let (algebra, start) = (Algebra::new(group, "opcm")?, self.start(group)?);
        let (sum, norms) = self.sum(&algebra, group, start)?;
        Ok(Some(Measured { norms, kept: keep.then(|| svd::rounded(&sum)) }))
    }

    fn with_norms(&self, norms: &OpcmNorms, kept: Option<Vec<f32>>) -> Option<Box<dyn MergeMethod>> {
        if !self.over_model {
            return None;
        }
        let method = Opcm { norms: Some(norms.clone()), ..self.clone() };
        Some(match kept {
            Some(sum) => Box::new(Summed { method, sum }),
            None => Box::new(method),
        })
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        let (algebra, start) = (Algebra::new(group, "opcm")?, self.start(group)?);
        if !group.is_matrix() {
            let state = self.end(start, &sum_norms(group, start)?);
            let factors = (start.lambda as f32, (1.0 / state.lambda) as f32);
            let pieces = move |piece: &mut Piece, out: &mut [f32]| {
                sum_piece(piece, factors.0, out);
                kernels::scale(out, factors.1);
                kernels::add_scaled(out, 1.0, &piece.base);
            };
            return Ok(Box::new(Merged { pieces, state }));
        }
        let (sum, norms) = self.sum(&algebra, group, start)?;
        let state = self.end(start, &norms);
        let pieces = Step { values: svd::rounded(&sum).into(), factor: 1.0 / state.lambda };
        Ok(Box::new(Merged { pieces, state }))
    }
}

/// The merge of a matrix whose `S_T` has already been computed.
struct Summed {
    method: Opcm,
    sum: Vec<f32>,
}

impl MergeMethod for Summed {
    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        let state = self.method.end(self.method.start(group)?, &OpcmNorms::default());
        let pieces = Step { values: self.sum.as_slice().into(), factor: 1.0 / state.lambda };
        Ok(Box::new(Merged { pieces, state }))
    }
}

impl Opcm {
    /// The contribution of this tensor to the norms over a model. This takes as long as the merge.
    ///
    /// # Errors
    /// Returns an error under the same conditions as the merge.
    pub fn measure(&self, group: &TensorGroup<'_>) -> Result<OpcmNorms, Error> {
        let (algebra, start) = (Algebra::new(group, "opcm")?, self.start(group)?);
        if group.is_matrix() { Ok(self.sum(&algebra, group, start)?.1) } else { sum_norms(group, start) }
    }

    fn start(&self, group: &TensorGroup<'_>) -> Result<OpcmTensor, Error> {
        let Some(state) = &self.previous else { return Ok(OpcmTensor { models: 0, lambda: 1.0, norm_sum: 0.0 }) };
        state.0.get(group.name).copied().ok_or_else(|| undefined(group, "opcm", Undefined::NotInState))
    }

    fn end(&self, start: OpcmTensor, norms: &OpcmNorms) -> OpcmTensor {
        let norms = self.norms.as_ref().unwrap_or(norms);
        let models = start.models + norms.task_vectors.len();
        let norm_sum = start.norm_sum + norms.task_vectors.iter().map(|x| x.sqrt()).sum::<f64>();
        let lambda = norms.sum.sqrt() / (norm_sum / models as f64);
        // If no model has changed the tensor, there is nothing to scale.
        let lambda = if norms.sum > 0.0 && lambda.is_finite() { lambda } else { 1.0 };
        OpcmTensor { models, lambda, norm_sum }
    }

    /// `S_T` of a matrix, row-major, and the norms.
    fn sum(
        &self,
        algebra: &Algebra<'_>,
        group: &TensorGroup<'_>,
        start: OpcmTensor,
    ) -> Result<(Vec<f64>, OpcmNorms), Error> {
        let (mut sum, mut norms): (Vec<f64>, _) = (Vec::new(), OpcmNorms::default());
        svd::each_task_vector(group, |model, delta| {
            if model > 0 || start.models == 0 {
                norms.task_vectors.push(kernels::dot(delta, delta));
            }
            if model == 0 {
                sum = delta.iter().map(|&d| start.lambda * f64::from(d)).collect();
                return Ok(());
            }
            let merged = algebra.triplets_f32(svd::matrix(&svd::rounded(&sum), group.shape))?;
            let mut new = delta.to_vec();
            self.remove_shared(algebra, &merged, &mut new, group.shape);
            sum.iter_mut().zip(&new).for_each(|(sum, &new)| *sum += f64::from(new));
            Ok(())
        })?;
        norms.sum = sum.iter().map(|v| v * v).sum();
        Ok((sum, norms))
    }

    /// Replaces `δ` by `P(δ)`.
    fn remove_shared(&self, algebra: &Algebra<'_>, merged: &Triplets<f32>, delta: &mut [f32], shape: &[usize]) {
        let Triplets { u, s, v } = merged;
        let limit = self.alpha * s.iter().sum::<f64>();
        let running = s.iter().scan(0.0, |sum, s| {
            *sum += s;
            Some(*sum)
        });
        let r = running.take_while(|&sum| self.alpha >= 1.0 || sum <= limit).count();
        let (u_leading, v_leading) = (u.subcols(0, r), v.subcols(0, r));
        // `δᵀ U`: the rows of `Uᵀ δ` as columns.
        let left = algebra.product_f32(svd::matrix(delta, shape).transpose(), u.as_ref());
        let mut removed = v.clone();
        for j in r..s.len() {
            let pairs = v.col_as_slice(j).iter().zip(left.col_as_slice(j));
            let diagonal = pairs.map(|(&v, &x)| f64::from(v) * f64::from(x)).sum::<f64>() as f32;
            removed.col_as_slice_mut(j).iter_mut().for_each(|v| *v *= diagonal);
        }
        let from = match self.projection {
            Projection::Leading => {
                let block = algebra.product_f32(v_leading.transpose(), left.subcols(0, r));
                removed.subcols_mut(0, r).copy_from(algebra.product_f32(v_leading, block.as_ref()));
                0
            }
            Projection::Complement => {
                let left = left.subcols(0, r).transpose();
                algebra.add_product_f32(svd::matrix_mut(delta, shape), -1.0, u_leading, left);
                let right = algebra.product_f32(svd::matrix(delta, shape), v_leading);
                algebra.add_product_f32(svd::matrix_mut(delta, shape), -1.0, right.as_ref(), v_leading.transpose());
                r
            }
        };
        let (u, removed) = (u.subcols(from, s.len() - from), removed.subcols(from, s.len() - from));
        algebra.add_product_f32(svd::matrix_mut(delta, shape), -1.0, u, removed.transpose());
    }
}

/// `S_T` of a piece of a tensor that is not a matrix.
fn sum_piece(piece: &mut Piece, lambda: f32, out: &mut [f32]) {
    piece.subtract_base();
    for (model, delta) in piece.models.iter().enumerate() {
        kernels::add_scaled(out, if model == 0 { lambda } else { 1.0 }, delta);
    }
}

fn sum_norms(group: &TensorGroup<'_>, start: OpcmTensor) -> Result<OpcmNorms, Error> {
    let parts = group.map_task_vectors(&group.pieces(false), |piece| {
        let [mut sum] = piece.zeros();
        sum_piece(piece, start.lambda as f32, &mut sum);
        let new = piece.models.iter().skip(usize::from(start.models > 0));
        let norms = OpcmNorms {
            task_vectors: new.map(|delta| kernels::dot(delta, delta)).collect(),
            sum: kernels::dot(&sum, &sum),
        };
        piece.give_back([sum]);
        norms
    })?;
    let mut norms = OpcmNorms::default();
    parts.iter().for_each(|part| norms += part);
    Ok(norms)
}

/// Merges pieces and returns the state from which a later merge can continue.
struct Merged<P> {
    pieces: P,
    state: OpcmTensor,
}

impl<P: MergePieces> MergePieces for Merged<P> {
    fn merge(&self, piece: &mut Piece, out: &mut [f32]) {
        self.pieces.merge(piece, out);
    }

    fn state(&self) -> Option<serde_json::Value> {
        Some(serde_json::to_value(self.state).expect("numbers are JSON"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::svd::testing::{assert_close, merge, outer, random, task_vectors, with_group};
    use super::*;
    use crate::methods::merge_tensor;
    use crate::tensor::Values;

    fn opcm(projection: Projection) -> Opcm {
        Opcm { alpha: 0.9, projection, previous: None, over_model: false, norms: None }
    }

    fn state_of(method: &Opcm, group: &TensorGroup<'_>) -> OpcmTensor {
        serde_json::from_value(method.prepare(group).unwrap().state().unwrap()).unwrap()
    }

    /// ```python
    /// total, norms = deltas[0], [np.linalg.norm(deltas[0])]
    /// for d in deltas[1:]:
    ///     u, s, vt = np.linalg.svd(total)
    ///     r = np.sum(np.cumsum(s) <= 0.9 * s.sum())
    ///     c = u.T @ d @ vt.T
    ///     np.fill_diagonal(c, 0)
    ///     c[:r, :r] = 0  # complement: c[:r, :] = 0 and c[:, :r] = 0
    ///     total, norms = total + u @ c @ vt, norms + [np.linalg.norm(d)]
    /// total * np.mean(norms) / np.linalg.norm(total)
    /// ```
    #[test]
    fn models_are_projected_off_each_other_as_in_numpy() {
        let deltas = task_vectors([3, 4], 3);
        let expected = [
            -0.48013, 0.242305, -0.115689, -0.177482, -0.270401, 0.581671, 0.135762, 0.613337, 0.411122, -0.175444,
            -0.069101, -0.835942,
        ];
        assert_close(&merge(&opcm(Projection::Leading), [3, 4], &deltas), &expected, 1e-5);
        let expected = [
            -0.438471, -0.10581, -0.375076, 0.001696, -0.441586, 0.641446, -0.450564, 0.206578, 0.492713, -0.211459,
            0.271027, -0.697394,
        ];
        assert_close(&merge(&opcm(Projection::Complement), [3, 4], &deltas), &expected, 1e-5);
    }

    /// Merging models at once and in several steps is equivalent, for matrices and other tensors, with a nonzero base.
    #[test]
    fn a_sequence_can_be_merged_as_it_grows() {
        for (shape, projection) in [
            (vec![9, 14], Projection::Leading),
            (vec![14, 9], Projection::Complement),
            (vec![126], Projection::Leading),
        ] {
            let mut values = random([9, 14], 5, 29);
            let base = values.pop().unwrap();
            let group = |models: &[&[f32]], f: &mut dyn FnMut(&TensorGroup<'_>)| {
                let models = models.iter().map(|x| Values::from_slice("m", x)).collect();
                let base = Some(Values::from_slice("base", &base));
                f(&TensorGroup::new("w", &shape, base, models));
            };
            let (mut at_once, mut merged) = (Vec::new(), values[0].clone());
            let mut method = opcm(projection);
            group(&values.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut |g| {
                at_once = merge_tensor(&method, g).unwrap();
            });
            for steps in [&values[1..2], &values[2..4]] {
                let mut models = vec![merged.as_slice()];
                models.extend(steps.iter().map(Vec::as_slice));
                let mut next = (Vec::new(), OpcmState::default());
                group(&models, &mut |g| {
                    next.0 = merge_tensor(&method, g).unwrap();
                    next.1.0.insert("w".to_owned(), state_of(&method, g));
                });
                method.previous = Some(serde_json::from_value(serde_json::to_value(next.1).unwrap()).unwrap());
                merged = next.0;
            }
            assert_eq!(method.previous.unwrap().0["w"].models, 4);
            assert_close(&merged, &at_once, 1e-5);
        }
    }

    #[test]
    fn the_merge_is_as_far_from_the_base_as_its_models() {
        let norm = |x: &[f32]| kernels::dot(x, x).sqrt();
        let deltas = random([8, 10], 4, 31);
        let mean = deltas.iter().map(|x| norm(x)).sum::<f64>() / 4.0;
        let merged = merge(&opcm(Projection::Leading), [8, 10], &deltas);
        assert!((norm(&merged) / mean - 1.0).abs() < 1e-6);
        let merged =
            with_group(&[80], &deltas, false, |group| merge_tensor(&opcm(Projection::Leading), group).unwrap());
        assert!((norm(&merged) / mean - 1.0).abs() < 1e-6);
    }

    #[test]
    fn what_is_there_already_is_not_added_again() {
        let delta = &random([6, 8], 1, 37)[0];
        for projection in [Projection::Leading, Projection::Complement] {
            let twice: Vec<f32> = delta.iter().map(|x| 2.0 * x).collect();
            let merged = merge(&Opcm { alpha: 0.5, ..opcm(projection) }, [6, 8], &[delta.clone(), twice]);
            // The result has the same direction and the mean norm.
            assert_close(&merged, &delta.iter().map(|x| 1.5 * x).collect::<Vec<f32>>(), 1e-5);
        }
    }

    #[test]
    fn nothing_is_removed_where_the_merge_is_zero() {
        let first = outer(&[1.0, 0.0, 0.0], &[1.0, 0.0, 0.0]);
        let second = outer(&[0.0, 1.0, 2.0], &[0.0, 2.0, 1.0]);
        let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
        let scale = (1.0 + 5.0) / 2.0 / 26f32.sqrt();
        let expected: Vec<f32> = sum.iter().map(|x| x * scale).collect();
        for projection in [Projection::Leading, Projection::Complement] {
            let method = Opcm { alpha: 1.0, ..opcm(projection) };
            assert_close(&merge(&method, [3, 3], &[first.clone(), second.clone()]), &expected, 1e-6);
        }
    }

    #[test]
    fn norms_over_a_model_give_one_lambda() {
        let (a, b) = (random([5, 6], 2, 41), random([5, 6], 2, 43));
        let mut method = opcm(Projection::Leading);
        let mut norms = OpcmNorms::default();
        norms += &with_group(&[5, 6], &a, false, |group| method.measure(group).unwrap());
        norms += &with_group(&[30], &b, false, |group| method.measure(group).unwrap());
        method.norms = Some(norms.clone());
        let states = [
            with_group(&[5, 6], &a, false, |group| state_of(&method, group)),
            with_group(&[30], &b, false, |group| state_of(&method, group)),
        ];
        assert_eq!(states[0], states[1]);
        let squares: Vec<f64> = (0..2).map(|t| kernels::dot(&a[t], &a[t]) + kernels::dot(&b[t], &b[t])).collect();
        assert!((states[0].norm_sum - squares.iter().map(|x| x.sqrt()).sum::<f64>()).abs() < 1e-9);
        assert!((states[0].lambda - norms.sum.sqrt() / (states[0].norm_sum / 2.0)).abs() < 1e-9);
    }

    #[test]
    fn a_state_without_the_tensor_is_an_error() {
        let method = Opcm { previous: Some(OpcmState::default()), ..opcm(Projection::Leading) };
        let error =
            with_group(&[2, 2], &random([2, 2], 2, 47), false, |group| merge_tensor(&method, group).unwrap_err());
        assert!(error.to_string().contains("`w`"), "{error}");
    }
}
