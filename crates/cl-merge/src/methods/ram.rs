//! RAM: the mean over the models that changed an entry. RAM+ also scales up entries that a single model changed.
//!
//! Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv 2601.13572.

use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::parameters::{INFINITE, ParameterInfo};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup};

/// Reinforced Agent Merging. Model `i` changes an entry if `|δᵢ| > epsilon`, and `c` is the number of models that
/// change it:
///
/// - `c = 0`, unchanged: `θ = θ₀`;
/// - `c = 1`, unique to model `i`: `θ = θ₀ + fᵢ δᵢ`;
/// - `c ≥ 2`, shared: `θ = θ₀ + Σ δᵢ / c`, over the models that change it.
///
/// RAM has `fᵢ = 1`, RAM+ `fᵢ = 1 + r · min(alpha, sᵢ / uᵢ)`, where model `i` changes `sᵢ` shared and `uᵢ` unique
/// entries of the tensor.
///
/// Yuan et al., arXiv 2601.13572. Counts are per tensor, as in mergekit's `ramplus_tl`; the authors' code counts over
/// the whole model and has `alpha = 1`.
#[derive(Clone, Debug)]
pub struct Ram {
    /// Differences up to this magnitude count as no change; at least 0.
    pub epsilon: f64,
    /// Scale of the amplification of unique entries; any number, 0 for RAM.
    pub r: f64,
    /// Upper bound of the ratio of shared to unique entries; at least 0.
    pub alpha: f64,
}

pub(super) const RAM: MethodInfo = MethodInfo {
    title: "RAM",
    paper: "Yuan et al., arXiv 2601.13572",
    formula: "θ₀ + mean of the δᵢ with |δᵢ| > epsilon, entry by entry",
    parameters: &["epsilon"],
    own_parameters: &[EPSILON],
    defaults: |_| Defaults::new().with("epsilon", 1e-5),
    ..MethodInfo::new("ram", build_ram)
};

pub(super) const RAM_PLUS: MethodInfo = MethodInfo {
    name: "ramplus_tl",
    title: "RAM+, tensor by tensor",
    formula: "as ram, where one model alone has |δᵢ| > epsilon times 1 + r · min(alpha, its shared / its unique entries)",
    parameters: &["epsilon", "r", "alpha"],
    own_parameters: &[
        EPSILON,
        ParameterInfo::number(
            "r",
            "scale of the amplification of entries that one model alone changes",
            "a finite number",
            INFINITE,
        ),
        ParameterInfo::number(
            "alpha",
            "upper bound of the ratio of a model's shared entries to its unique entries",
            "at least 0",
            (0.0, f64::MAX),
        ),
    ],
    defaults: |_| Defaults::new().with("epsilon", 1e-5).with("r", 0.1).with("alpha", 0.2),
    build: build_ram_plus,
    ..RAM
};

const EPSILON: ParameterInfo = ParameterInfo::number(
    "epsilon",
    "magnitude up to which a difference counts as no change",
    "at least 0",
    (0.0, f64::MAX),
);

#[derive(Deserialize)]
struct Threshold {
    epsilon: f64,
}

#[derive(Deserialize)]
struct Amplification {
    r: f64,
    alpha: f64,
}

fn build_ram(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Threshold { epsilon } = settings.read()?;
    Ok(Box::new(Ram { epsilon, r: 0.0, alpha: 0.0 }))
}

fn build_ram_plus(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Threshold { epsilon } = settings.read()?;
    let Amplification { r, alpha } = settings.read()?;
    Ok(Box::new(Ram { epsilon, r, alpha }))
}

impl MergeMethod for Ram {
    fn task_vectors(&self) -> bool {
        true
    }

    fn reads_twice(&self, group: &TensorGroup<'_>) -> bool {
        self.amplifies(group)
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() {
            return Err(undefined(group, "ram", Undefined::NoBase("compares task vectors")));
        }
        let factors = self.factors(group)?;
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| self.merge(&factors, piece, out)))
    }
}

impl Ram {
    /// Whether a factor can differ from 1. A single model has no shared entries.
    fn amplifies(&self, group: &TensorGroup<'_>) -> bool {
        group.models.len() > 1 && self.r != 0.0 && self.alpha > 0.0
    }

    /// The factor of each model's unique entries.
    fn factors(&self, group: &TensorGroup<'_>) -> Result<Vec<f32>, Error> {
        let mut totals = vec![Changed::default(); group.models.len()];
        if self.amplifies(group) {
            let counts = group.map_task_vectors(&group.pieces(false), |piece| self.count(piece))?;
            for of_piece in counts {
                for (total, changed) in totals.iter_mut().zip(of_piece) {
                    total.shared += changed.shared;
                    total.unique += changed.unique;
                }
            }
        }
        Ok(totals.iter().map(|total| self.factor(total) as f32).collect())
    }

    fn factor(&self, changed: &Changed) -> f64 {
        // Without unique entries, there is nothing to multiply.
        let ratio = if changed.unique == 0 { 0.0 } else { changed.shared as f64 / changed.unique as f64 };
        1.0 + self.r * ratio.min(self.alpha)
    }

    /// Number of entries of a piece that each model changes.
    fn count(&self, piece: &mut Piece) -> Vec<Changed> {
        piece.subtract_base();
        let epsilon = self.epsilon as f32;
        let [mut count] = piece.zeros();
        for x in &piece.models {
            for (count, x) in count.iter_mut().zip(x) {
                *count += if x.abs() > epsilon { 1.0 } else { 0.0 };
            }
        }
        let changed = |x: &Vec<f32>| {
            let (mut all, mut unique) = (0u32, 0u32);
            for (x, count) in x.iter().zip(&count) {
                let changes = u32::from(x.abs() > epsilon);
                all += changes;
                unique += changes & u32::from(*count == 1.0);
            }
            Changed { shared: u64::from(all - unique), unique: u64::from(unique) }
        };
        let counts = piece.models.iter().map(changed).collect();
        piece.give_back([count]);
        counts
    }

    fn merge(&self, factors: &[f32], piece: &mut Piece, out: &mut [f32]) {
        piece.subtract_base();
        let epsilon = self.epsilon as f32;
        let [mut count, mut sum, mut amplified] = piece.zeros();
        for (x, factor) in piece.models.iter().zip(factors) {
            let sums = count.iter_mut().zip(&mut sum).zip(&mut amplified);
            for (((count, sum), amplified), &x) in sums.zip(x) {
                let (one, change) = if x.abs() > epsilon { (1.0, x) } else { (0.0, 0.0) };
                *count += one;
                *sum += change;
                *amplified += factor * change;
            }
        }
        let sums = count.iter().zip(&sum).zip(&amplified);
        for ((out, base), ((&count, sum), amplified)) in out.iter_mut().zip(&piece.base).zip(sums) {
            *out = base + if count == 1.0 { *amplified } else { sum / count.max(1.0) };
        }
        piece.give_back([count, sum, amplified]);
    }
}

/// Number of entries that one model changes.
#[derive(Clone, Default)]
struct Changed {
    /// Entries that other models also change.
    shared: u64,
    /// Entries that no other model changes.
    unique: u64,
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;
    use crate::tensor::PIECE;

    const BASE: [f32; 6] = [1.0; 6];
    /// Task vectors 2, 4, 1, 0.25, 0, 8 and 4, -2, 0, 0.25, 1, 0.5 and 0, 1, 0, -0.5, 0, 0.25.
    const MODELS: [&[f32]; 3] =
        [&[3.0, 5.0, 2.0, 1.25, 1.0, 9.0], &[5.0, -1.0, 1.0, 1.25, 2.0, 1.5], &[1.0, 2.0, 1.0, 0.5, 1.0, 1.25]];

    fn ram(epsilon: f64) -> Ram {
        Ram { epsilon, r: 0.0, alpha: 0.2 }
    }

    fn out(method: &Ram) -> Vec<f32> {
        merged(method, &[2, 3], Some(&BASE), &MODELS).unwrap()
    }

    /// At 0.5 entries are shared by two, shared by three, unique, unchanged, unique, unique. At the threshold nothing
    /// changes.
    #[test]
    fn means_are_over_the_models_that_change_an_entry() {
        assert_eq!(out(&ram(0.5)), [4.0, 2.0, 2.0, 1.0, 2.0, 9.0]);
        // Below it -0.5 is unique, and 0.5 is shared with 8.
        assert_eq!(out(&ram(0.49)), [4.0, 2.0, 2.0, 0.5, 2.0, 5.25]);
        assert_eq!(out(&ram(0.0)), [4.0, 2.0, 2.0, 1.0, 2.0, 1.0 + 8.75 / 3.0]);
        assert_eq!(out(&ram(8.0)), BASE);
    }

    /// At 0.5 the first model changes two shared and two unique entries, the second two and one, the third one and
    /// none.
    #[test]
    fn unique_entries_are_amplified_by_the_ratio_of_shared_to_unique_entries() {
        let plus = |r, alpha| out(&Ram { r, alpha, ..ram(0.5) });
        // Ratios 1 and 2.
        assert_eq!(plus(0.5, 4.0), [4.0, 2.0, 2.5, 1.0, 3.0, 13.0]);
        assert_eq!(plus(0.5, 1.5), [4.0, 2.0, 2.5, 1.0, 2.75, 13.0]);
        assert_eq!(plus(0.5, 0.5), [4.0, 2.0, 2.25, 1.0, 2.25, 11.0]);
        assert_eq!(plus(-0.5, 4.0), [4.0, 2.0, 1.5, 1.0, 1.0, 5.0]);
        for (r, alpha) in [(0.0, 1.0), (0.5, 0.0)] {
            assert_eq!(plus(r, alpha), out(&ram(0.5)));
        }
    }

    /// Only unchanged or only unique entries: the ratio is zero, or its divisor is.
    #[test]
    fn without_shared_entries_nothing_is_amplified() {
        let plus = Ram { r: 1.0, alpha: 1.0, ..ram(0.0) };
        let apart: [&[f32]; 2] = [&[2.0, 1.0, 1.0], &[1.0, 3.0, 1.0]];
        assert_eq!(merged(&plus, &[3], Some(&BASE[..3]), &apart).unwrap(), [2.0, 3.0, 1.0]);
        assert_eq!(merged(&plus, &[6], Some(&BASE), &[&BASE, MODELS[0]]).unwrap(), MODELS[0]);
        // All entries that the first model changes are shared, and one of the two that the second changes.
        let within: [&[f32]; 2] = [&[2.0, 1.0, 1.0], &[4.0, 3.0, 1.0]];
        assert_eq!(merged(&plus, &[3], Some(&BASE[..3]), &within).unwrap(), [3.0, 5.0, 1.0]);
    }

    /// Shared entries in the first piece only, unique entries of the first model in the last only.
    #[test]
    fn entries_are_counted_over_the_whole_tensor() {
        let n = 40 * PIECE + 3;
        let base = vec![0.0; n];
        let (mut a, mut b) = (base.clone(), base.clone());
        a[..3].fill(2.0);
        b[..3].fill(1.0);
        a[n - 4..].fill(1.0);
        let values = merged(&Ram { r: 1.0, alpha: 1.0, ..ram(1e-5) }, &[n], Some(&base), &[&a, &b]).unwrap();
        let mut expected = base;
        expected[..3].fill(1.5);
        expected[n - 4..].fill(1.75);
        assert_eq!(values, expected);
    }

    #[test]
    fn equal_single_scalar_empty_and_without_a_base() {
        for method in [ram(0.0), Ram { r: 0.5, alpha: 1.0, ..ram(0.0) }] {
            for models in [&[MODELS[0]; 1][..], &[MODELS[0]; 4]] {
                assert_eq!(merged(&method, &[6], Some(&BASE), models).unwrap(), MODELS[0]);
            }
            assert_eq!(merged(&method, &[6], Some(&BASE), &[&BASE, &BASE]).unwrap(), BASE);
            assert_eq!(merged(&method, &[], Some(&[1.0]), &[&[3.0]]).unwrap(), [3.0]);
            assert!(merged(&method, &[0], Some(&[]), &[&[], &[]]).unwrap().is_empty());
            assert!(merged(&method, &[6], None, &MODELS).is_err());
        }
    }
}
