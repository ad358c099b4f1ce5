use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::select::keep_largest;
use crate::tensor::{Piece, TensorGroup};

/// Uses the most important entries of the model, and the base elsewhere: `θ = θ₀ + δ · [s ≥ q₂ + 1.5 (q₃ − q₁)]` with
/// importances `s = |δ| · KL(softmax(θ₁ row) ‖ softmax(θ₀ row))` and their quartiles `q` over the tensor.
///
/// Arcee's fusion in mergekit. 1e-8 is added to each softmax, rows are along the last dimension, and the quartile `q`
/// of `n` sorted importances is the one with index `⌊q (n−1)⌋`. mergekit estimates the quartiles of tensors with more
/// than a million entries from a sample; here they are exact. mergekit computes the divergence, a small difference of
/// nearly equal numbers, in f32, where rounding can make it negative; here it is computed in f64 and at least 0.
///
/// If at least three quarters of the importances are zero, for example because few entries differ, the threshold is
/// zero and all differences are used.
#[derive(Clone, Debug)]
pub struct ArceeFusion;

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Arcee Fusion",
    paper: "mergekit",
    formula: "θ₀ + δ where |δ| · KL(softmax θ₁ ‖ softmax θ₀) is at least median + 1.5 (q₃ − q₁)",
    models: 1..=1,
    ordered: true,
    for_updates: false,
    ..MethodInfo::new("arcee_fusion", |_| Ok(Box::new(ArceeFusion)))
};

/// Added to each softmax.
const EPS: f64 = 1e-8;
/// The largest key; keys have no sign bit.
const LARGEST_KEY: u32 = 0x7fff_ffff;

impl MergeMethod for ArceeFusion {
    fn whole_rows(&self) -> bool {
        true
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        group.elements() / group.columns().max(1) * size_of::<f32>()
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() || group.models.len() != 1 {
            return Err(undefined(group, "arcee_fusion", Undefined::NotOneModelOnBase("fuses one model into a base")));
        }
        let columns = group.columns();
        let divergences = group.map_pieces(&group.pieces(true), |piece| divergences(piece, columns))?.concat();
        let threshold = threshold(group, &divergences)?;
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
            let rows = rows(piece, columns).zip(&divergences[piece.start / columns..]);
            for (((base, model), &divergence), out) in rows.zip(out.chunks_mut(columns)) {
                for ((out, base), model) in out.iter_mut().zip(base).zip(model) {
                    let taken = importance(*base, *model, divergence) >= threshold;
                    *out = if taken { base + (model - base) } else { *base };
                }
            }
        }))
    }
}

/// The piece's rows of the base and the model.
fn rows(piece: &Piece, columns: usize) -> impl Iterator<Item = (&[f32], &[f32])> {
    piece.base.chunks(columns).zip(piece.models[0].chunks(columns))
}

fn importance(base: f32, model: f32, divergence: f32) -> f32 {
    // Clamped, because infinity times zero is NaN.
    (model - base).abs().min(f32::MAX) * divergence
}

/// The Kullback–Leibler divergence of each row.
fn divergences(piece: &Piece, columns: usize) -> Vec<f32> {
    let (mut p, mut q) = (vec![0.0; columns], vec![0.0; columns]);
    rows(piece, columns)
        .map(|(base, model)| {
            softmax(model, &mut p);
            softmax(base, &mut q);
            let divergence: f64 = p.iter().zip(&q).map(|(p, q)| (p + EPS) * ((p + EPS) / (q + EPS)).ln()).sum();
            // Both distributions have the same sum, so a negative divergence is a rounding error.
            divergence.max(0.0) as f32
        })
        .collect()
}

fn softmax(x: &[f32], out: &mut [f64]) {
    let greatest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for (out, x) in out.iter_mut().zip(x) {
        *out = (f64::from(*x) - f64::from(greatest)).exp();
    }
    let total: f64 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= total);
}

/// The threshold of importances: the median plus 1.5 times the interquartile range.
fn threshold(group: &TensorGroup<'_>, divergences: &[f32]) -> Result<f32, Error> {
    let (n, columns) = (group.elements(), group.columns());
    if n < 2 {
        // The divergence of a row with one entry is 0.
        return Ok(0.0);
    }
    let from_below: Vec<usize> = [0.25, 0.5, 0.75].map(|q| (q * (n - 1) as f64) as usize + 1).to_vec();
    // Subtracting the bits of nonnegative numbers from the largest key reverses their order, so the k largest keys are
    // the k smallest importances.
    let trims = keep_largest(group, true, &from_below, |piece, _, keys| {
        let rows = rows(piece, columns).zip(&divergences[piece.start / columns..]);
        for (((base, model), &divergence), keys) in rows.zip(keys.chunks_mut(columns)) {
            for ((key, base), model) in keys.iter_mut().zip(base).zip(model) {
                *key = LARGEST_KEY - importance(*base, *model, divergence).to_bits();
            }
        }
    })?;
    let [q1, q2, q3] = [0, 1, 2].map(|i: usize| f32::from_bits(LARGEST_KEY - trims[i].threshold));
    Ok(q2 + 1.5 * (q3 - q1))
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;
    use crate::tensor::PIECE;

    fn fused(shape: &[usize], base: &[f32], model: &[f32]) -> Vec<f32> {
        merged(&ArceeFusion, shape, Some(base), &[model]).unwrap()
    }

    /// ```python
    /// b = torch.tensor([[0., 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    /// m = b + torch.tensor([[.1, .1, .2, .1, .1, .9], [0, .1, -.1, .1, .3, .1]])
    /// p, q = m.softmax(-1) + 1e-8, b.softmax(-1) + 1e-8
    /// s = (m - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    /// v = s.flatten().sort().values
    /// v[5] + 1.5 * (v[8] - v[2])
    /// # 0.0100; s = [[.0059, .0059, .0119, .0059, .0059, .0533], [0, .0008, .0008, .0008, .0023, .0008]]
    /// ```
    #[test]
    fn known_values() {
        let base = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let model = [0.1, 1.1, 2.2, 3.1, 4.1, 5.9, 1.0, 1.1, 0.9, 1.1, 1.3, 1.1];
        let mut expected = base;
        (expected[2], expected[5]) = (2.2, 5.9);
        assert_eq!(fused(&[2, 6], &base, &model), expected);
    }

    /// Compares with a sort of all importances, on rows that do not fill pieces.
    #[test]
    fn quartiles_are_those_of_a_sort() {
        let (rows, columns) = (70, PIECE / 7);
        let n = rows * columns;
        let base: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 1009.0).collect();
        // Cubed, so that the tail is heavy enough for some importances to exceed the threshold.
        let step = |i: usize| (((i * 104_729) % 997) as f32 / 997.0 - 0.5).powi(3);
        let model: Vec<f32> = (0..n).map(|i| base[i] + step(i)).collect();
        let out = fused(&[7, rows / 7, columns], &base, &model);
        let values = |x| Some(crate::tensor::Values::from_slice("m", x));
        let shape = [rows, columns];
        let group = TensorGroup::new("w", &shape, values(&base), vec![values(&model).unwrap()]);
        let divergences = group.map_pieces(&group.pieces(true), |piece| divergences(piece, columns)).unwrap().concat();
        let importances: Vec<f32> = (0..n).map(|i| importance(base[i], model[i], divergences[i / columns])).collect();
        let mut sorted = importances.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let [q1, q2, q3] = [n - 1, 2 * (n - 1), 3 * (n - 1)].map(|i| sorted[i / 4]);
        let threshold = q2 + 1.5 * (q3 - q1);
        let taken = importances.iter().filter(|&&s| s >= threshold).count();
        assert!(taken > n / 1000 && taken < n / 3, "{taken} of {n}");
        for i in 0..n {
            let expected = if importances[i] >= threshold { base[i] + (model[i] - base[i]) } else { base[i] };
            assert_eq!(out[i], expected, "{i}");
        }
    }

    #[test]
    fn equal_short_scalar_and_empty() {
        let x = [0.1, -0.7, 0.3];
        assert_eq!(fused(&[3], &x, &x), x);
        // The divergence of rows with one entry is 0, so every entry is at the threshold.
        assert_eq!(fused(&[3, 1], &[0.0; 3], &x), x);
        assert_eq!(fused(&[], &[1.0], &[3.0]), [3.0]);
        // Importances 0, s and s, 0: the threshold is s or zero.
        assert_eq!(fused(&[2], &[1.0, 2.0], &[1.0, 3.0]), [1.0, 3.0]);
        assert!(fused(&[0], &[], &[]).is_empty() && fused(&[4, 0], &[], &[]).is_empty());
        // Exponentials of large values do not overflow.
        assert!(fused(&[2, 2], &[1e30, -1e30, 5.0, 0.0], &[-1e30, 1e30, 5.0, 1.0]).iter().all(|x| x.is_finite()));
        assert!(merged(&ArceeFusion, &[3], None, &[&x]).is_err());
        assert!(merged(&ArceeFusion, &[3], Some(&x), &[&x, &x]).is_err());
    }
}
