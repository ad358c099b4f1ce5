use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::parameters::{ParameterInfo, SHARE};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::select::{Trim, keep_largest};
use crate::tensor::{Piece, TensorGroup, kernels};

/// Select, calculate, erase: `θ = θ₀ + Σ wᵢ mᵢ δᵢ / Σ wᵢ mᵢ`, over the entries in which task vectors differ most.
///
/// 1. Select the `⌊select_topk · n⌋` entries of largest variance over the models, of the `n` entries whose variance is
///    not zero.
/// 2. Calculate the weights `wᵢ`: the mean squares of the selected entries, normalized to a sum of 1.
/// 3. Erase, with the masks `mᵢ`, entries whose sign is not that of `Σ δᵢ`; a sum of zero elects plus.
///
/// Wan et al., "FuseChat", arXiv 2408.07990. As in mergekit, all weights are equal if the mean squares sum to less than
/// 1e-6, a divisor below 1e-6 is replaced by 1e-6, and the fraction refers to the entries with nonzero variance. Among
/// equal variances, the entries with the lowest index are selected. A single model has no variance, so that
/// `select_topk` below 1 returns the base.
#[derive(Clone, Debug)]
pub struct Sce {
    /// Fraction of entries to select, 0 to 1; at 1 and above all, at 0 and below none.
    pub select_topk: f64,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "SCE",
    paper: "Wan et al., arXiv 2408.07990",
    formula: "select entries by variance, weigh models by energy, erase minority signs",
    parameters: &["select_topk", "int8_mask"],
    own_parameters: &[ParameterInfo::number(
        "select_topk",
        "fraction of entries to keep, those with the highest variance between models",
        "0 to 1",
        SHARE,
    )],
    defaults: |_| Defaults::new().with("select_topk", 1.0),
    ..MethodInfo::new("sce", build)
};

#[derive(Deserialize)]
struct Settings {
    select_topk: f64,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { select_topk } = settings.read()?;
    Ok(Box::new(Sce { select_topk }))
}

impl MergeMethod for Sce {
    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() {
            return Err(undefined(group, "sce", Undefined::NoBase("weighs task vectors")));
        }
        let trim = self.select(group)?;
        let weights = weights(group, trim)?;
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
            select(piece, trim);
            let [mut elected, mut divisor] = piece.zeros();
            piece.models.iter().for_each(|x| kernels::add_scaled(&mut elected, 1.0, x));
            for (&weight, x) in weights.iter().zip(&piece.models) {
                kernels::add_elected(out, &mut divisor, &elected, x, weight);
            }
            for ((out, divisor), base) in out.iter_mut().zip(&divisor).zip(&piece.base) {
                *out = base + *out / divisor.max(1e-6);
            }
            piece.give_back([elected, divisor]);
        }))
    }
}

impl Sce {
    /// The selected entries, as a trim by the keys of variances.
    fn select(&self, group: &TensorGroup<'_>) -> Result<Trim, Error> {
        if self.select_topk >= 1.0 {
            return Ok(Trim::ALL);
        }
        let count = |piece: &mut Piece| {
            let mut keys = std::mem::take(&mut piece.words);
            variances(piece, &mut keys);
            let count = keys.iter().filter(|&&key| key > 0).count();
            piece.words = keys;
            count
        };
        let nonzero: usize = group.map_task_vectors(&group.pieces(false), count)?.into_iter().sum();
        // The product is computed in f32, as in mergekit: 0.29 · 100 is 29 in f32, but not in f64.
        let k = (nonzero as f32 * self.select_topk as f32) as usize;
        let trims = keep_largest(group, false, &[k.min(nonzero)], |piece, _, keys| variances(piece, keys))?;
        Ok(trims[0])
    }
}

/// Turns the piece's models into task vectors and writes the keys of their variances.
fn variances(piece: &mut Piece, keys: &mut Vec<u32>) {
    piece.subtract_base();
    keys.resize(piece.len(), 0);
    let models: Vec<&[f32]> = piece.models.iter().map(Vec::as_slice).collect();
    kernels::variance_keys(&models, keys);
}

/// Turns the piece's models into task vectors with zeros where entries are not selected.
fn select(piece: &mut Piece, trim: Trim) {
    if trim == Trim::ALL {
        return piece.subtract_base();
    }
    let mut keys = std::mem::take(&mut piece.words);
    variances(piece, &mut keys);
    for x in &mut piece.models {
        for ((i, x), &key) in x.iter_mut().enumerate().zip(&keys) {
            *x = if trim.keeps(key, piece.start + i) { *x } else { 0.0 };
        }
    }
    piece.words = keys;
}

fn weights(group: &TensorGroup<'_>, trim: Trim) -> Result<Vec<f32>, Error> {
    let squares = group.map_task_vectors(&group.pieces(false), |piece| {
        select(piece, trim);
        piece.models.iter().map(|x| kernels::dot(x, x)).collect::<Vec<f64>>()
    })?;
    let n = group.elements().max(1) as f64;
    let means: Vec<f64> =
        (0..group.models.len()).map(|model| squares.iter().map(|piece| piece[model]).sum::<f64>() / n).collect();
    let total: f64 = means.iter().sum();
    let weight = |mean: &f64| if total < 1e-6 { 1.0 / means.len() as f64 } else { mean / total };
    Ok(means.iter().map(|mean| weight(mean) as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;
    use crate::tensor::PIECE;

    fn sce(select_topk: f64, base: &[f32], models: &[&[f32]]) -> Vec<f32> {
        merged(&Sce { select_topk }, &[base.len()], Some(base), models).unwrap()
    }

    const BASE: [f32; 4] = [1.0; 4];
    /// Task vectors 1, -2, 3, 0 and 1, 1, 1, 0.
    const MODELS: [&[f32]; 2] = [&[2.0, -1.0, 4.0, 1.0], &[2.0, 2.0, 2.0, 1.0]];

    /// ```python
    /// d = np.array([[1., -2, 3, 0], [1, 1, 1, 0]]) * mask
    /// w = (d ** 2).mean(1) / (d ** 2).mean(1).sum()
    /// m = (np.sign(d) == np.where(d.sum(0) >= 0, 1, -1)) * w[:, None]
    /// 1 + (m * d).sum(0) / np.maximum(m.sum(0), 1e-6)
    /// # all: w = 14/17, 3/17; d.var(0) = 0, 2.25, 1, 0
    /// ```
    #[test]
    fn known_values() {
        let close = |out: Vec<f32>, expected: [f32; 4]| {
            assert!(out.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{out:?} {expected:?}");
        };
        close(sce(1.0, &BASE, &MODELS), [2.0, -1.0, 1.0 + 45.0 / 17.0, 1.0]);
        // Half of the two entries with a variance: the second.
        close(sce(0.5, &BASE, &MODELS), [1.0, -1.0, 1.0, 1.0]);
        // ⌊0.99 · 2⌋ is one as well, and ⌊0.49 · 2⌋ none.
        close(sce(0.99, &BASE, &MODELS), [1.0, -1.0, 1.0, 1.0]);
        close(sce(0.49, &BASE, &MODELS), BASE);
        close(sce(0.0, &BASE, &MODELS), BASE);
        close(sce(-1.0, &BASE, &MODELS), BASE);
    }

    #[test]
    fn equal_unchanged_single_scalar_and_empty() {
        let x: [f32; 4] = [1.5, 0.5, 1.0, 3.0];
        assert_eq!(sce(1.0, &BASE, &[&x, &x]), x);
        assert_eq!(sce(1.0, &BASE, &[&x]), x);
        for select_topk in [1.0, 0.5] {
            assert_eq!(sce(select_topk, &x, &[&x, &x, &x]), x);
            assert!(sce(select_topk, &[], &[&[], &[]]).is_empty());
        }
        assert_eq!(sce(0.5, &BASE, &[&x]), BASE);
        assert_eq!(merged(&Sce { select_topk: 1.0 }, &[], Some(&[1.0]), &[&[3.0], &[3.0]]).unwrap(), [3.0]);
        assert!(merged(&Sce { select_topk: 1.0 }, &[4], None, &MODELS).is_err());
        // Task vectors whose squares are too small to derive weights from.
        let small = 2.0f32.powi(-13);
        assert_eq!(sce(1.0, &[0.0], &[&[small], &[3.0 * small]]), [2.0 * small]);
    }

    /// Selects exactly k entries of many pieces, the first ones if variances are equal.
    #[test]
    fn ties_are_selected_from_the_start() {
        let n = 3 * PIECE;
        let base = vec![0.0; n];
        let (a, b) = (vec![1.0; n], vec![2.0; n]);
        let out = sce(0.5, &base, &[&a, &b]);
        let k = n / 2;
        assert!(out[..k].iter().all(|&x| (x - 1.8).abs() < 1e-6) && out[k..].iter().all(|&x| x == 0.0));
    }
}
