//! Exact selection of the k largest of many values; ties go to the lowest index.
//!
//! Differences of bf16 weights have few distinct values, so thousands can lie exactly at the threshold; which of them
//! are kept must not depend on the order that a sort produces.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::group::{Piece, TensorGroup, runs};
use super::keys::{ALL, Cut, Keys, NONE, largest};
pub use super::trim::Trim;
use super::trim::kept;
use crate::Error;

/// Pieces that are read together.
type Run = Vec<Range<usize>>;

fn runs_of(group: &TensorGroup<'_>, whole_rows: bool) -> Vec<Run> {
    runs(&group.pieces(whole_rows)).into_iter().map(<[_]>::to_vec).collect()
}

fn length(run: &Run) -> usize {
    run.iter().map(Range::len).sum()
}

/// The middle `part` elements of a run, or its middle piece if whole rows are needed; the whole run if `part` is
/// `None`.
fn part_of(run: &Run, part: Option<usize>, whole_rows: bool) -> Cow<'_, [Range<usize>]> {
    let Some(part) = part else { return Cow::Borrowed(run) };
    if whole_rows {
        return Cow::Borrowed(&run[run.len() / 2..][..1]);
    }
    let part = part.min(length(run));
    let start = run[0].start + (length(run) - part) / 2;
    Cow::Owned(std::iter::once(start..start + part).collect())
}

/// The runs of one tensor, with a function that computes the keys of a request.
struct TensorKeys<'g, 'a, F> {
    group: &'g TensorGroup<'a>,
    runs: Vec<Run>,
    whole_rows: bool,
    task_vectors: bool,
    requests: usize,
    key: F,
}

impl<F: Fn(&mut Piece, usize, &mut dyn FnMut(&[u32])) + Sync> Keys for TensorKeys<'_, '_, F> {
    fn lengths(&self) -> Vec<usize> {
        self.runs.iter().map(length).collect()
    }

    fn with_keys(&self, run: usize, part: Option<usize>, f: &mut dyn FnMut(usize, &[u32])) -> Result<(), Error> {
        let pieces = part_of(&self.runs[run], part, self.whole_rows);
        self.group.with_pieces(&pieces, self.task_vectors, |piece| {
            for request in 0..self.requests {
                (self.key)(piece, request, &mut |keys| f(request, keys));
            }
        })?;
        Ok(())
    }

    fn map<R: Send>(&self, indices: &[usize], f: impl Fn(usize) -> Result<R, Error> + Sync) -> Result<Vec<R>, Error> {
        self.group.map(indices, |&i| f(i))
    }
}

/// Bits of values; as keys, they have the order of magnitudes.
pub(crate) fn bits(values: &[f32]) -> &[u32] {
    bytemuck::cast_slice(values)
}

/// For each entry of `k`, one per model, the trim that keeps the `k` entries of largest magnitude of that model's task
/// vector.
///
/// # Errors
/// Returns an error if reading fails.
///
/// # Panics
/// Panics if there are more entries than models.
pub fn keep_largest_changes(group: &TensorGroup<'_>, k: &[usize]) -> Result<Vec<Trim>, Error> {
    keep(group, false, true, k, |piece, model, f| f(bits(&piece.models[model])))
}

/// For each entry of `k`, the trim that keeps the `k` largest keys of a tensor.
///
/// `key(piece, request, keys)` writes a piece's keys for that request; it is called with the requests in order, on the
/// same piece, and may overwrite the piece; `keys` has one entry for each of its elements. For `whole_rows`, see [`TensorGroup::pieces`].
///
/// # Errors
/// Returns an error if reading fails.
pub fn keep_largest(
    group: &TensorGroup<'_>,
    whole_rows: bool,
    k: &[usize],
    key: impl Fn(&mut Piece, usize, &mut Vec<u32>) + Sync,
) -> Result<Vec<Trim>, Error> {
    keep(group, whole_rows, false, k, |piece, request, f| {
        let mut words = std::mem::take(&mut piece.words);
        words.resize(piece.len(), 0);
        key(piece, request, &mut words);
        f(&words);
        piece.words = words;
    })
}

/// [`keep_largest`] with keys that are passed on as slices and need not be written to a buffer. Their sign bit is
/// ignored.
pub(crate) fn keep(
    group: &TensorGroup<'_>,
    whole_rows: bool,
    task_vectors: bool,
    k: &[usize],
    key: impl Fn(&mut Piece, usize, &mut dyn FnMut(&[u32])) + Sync,
) -> Result<Vec<Trim>, Error> {
    let runs = runs_of(group, whole_rows);
    let keys = TensorKeys { group, runs, whole_rows, task_vectors, requests: k.len(), key };
    let trim = |cut: Cut| {
        if cut == ALL {
            return Trim::ALL;
        }
        let ties_end = keys.runs.get(cut.run).map_or(0, |run| run[0].start + cut.place);
        Trim { threshold: cut.threshold, ties_end: if cut == NONE { 0 } else { ties_end } }
    };
    Ok(largest(&keys, k)?.into_iter().map(trim).collect())
}

/// The runs of all tensors of a model, in the order of tensors, for trimming over the whole model.
struct ModelKeys<'g, 'a> {
    groups: &'g [TensorGroup<'a>],
    places: Vec<(usize, Run)>, // tensor, and pieces of it
    models: usize,
}

impl Keys for ModelKeys<'_, '_> {
    fn lengths(&self) -> Vec<usize> {
        self.places.iter().map(|(_, run)| length(run)).collect()
    }

    fn with_keys(&self, run: usize, part: Option<usize>, f: &mut dyn FnMut(usize, &[u32])) -> Result<(), Error> {
        let (group, run) = &self.places[run];
        self.groups[*group].with_pieces(&part_of(run, part, false), true, |piece| {
            for model in 0..self.models {
                f(model, bits(&piece.models[model]));
            }
        })?;
        Ok(())
    }

    fn map<R: Send>(&self, indices: &[usize], f: impl Fn(usize) -> Result<R, Error> + Sync) -> Result<Vec<R>, Error> {
        let results: Vec<_> = indices.par_iter().map(|&i| f(i)).collect();
        results.into_iter().collect()
    }
}

/// For each tensor and model, the trim over the whole model: it keeps the `⌊density · N⌋` entries of largest magnitude
/// among all `N` task-vector entries of the model.
///
/// # Errors
/// Returns an error if reading fails.
///
/// # Panics
/// Panics if a tensor has fewer models than there are densities.
pub fn trim_models(groups: &[TensorGroup<'_>], density: &[f64]) -> Result<Vec<Vec<Trim>>, Error> {
    let places: Vec<(usize, Run)> = groups
        .iter()
        .enumerate()
        .flat_map(|(i, group)| runs_of(group, false).into_iter().map(move |run| (i, run)))
        .collect();
    let total: usize = places.iter().map(|(_, run)| length(run)).sum();
    let keys = ModelKeys { groups, places, models: density.len() };
    let k: Vec<usize> = density.iter().map(|&d| kept(d, total)).collect();
    let cuts = largest(&keys, &k)?;
    let trim = |group: usize, cut: &Cut| {
        if *cut == ALL || *cut == NONE {
            return if *cut == ALL { Trim::ALL } else { Trim::NONE };
        }
        let (last, run) = &keys.places[cut.run];
        let ties_end = match group.cmp(last) {
            std::cmp::Ordering::Less => usize::MAX,
            std::cmp::Ordering::Equal => run[0].start + cut.place,
            std::cmp::Ordering::Greater => 0,
        };
        Trim { threshold: cut.threshold, ties_end }
    };
    Ok((0..groups.len()).map(|group| cuts.iter().map(|cut| trim(group, cut)).collect()).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tensor::Values;
    use crate::tensor::keys::MAGNITUDE;

    /// The reference: what a full sort keeps, by larger magnitude first, then by lower index.
    fn by_sorting(x: &[f32], k: usize) -> Vec<f32> {
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|&a, &b| x[b].abs().total_cmp(&x[a].abs()).then(a.cmp(&b)));
        let mut kept = vec![0.0; x.len()];
        order[..k.min(x.len())].iter().for_each(|&i| kept[i] = x[i]);
        kept
    }

    fn check(x: &[f32], k: usize, parallel: bool) {
        let shape = [x.len()];
        let models = vec![Values::from_slice("m", x)];
        let group = TensorGroup { parallel, ..TensorGroup::new("w", &shape, None, models) };
        let key = |piece: &mut Piece, _: usize, keys: &mut Vec<u32>| keys.copy_from_slice(bits(&piece.models[0]));
        let trim = keep_largest(&group, false, &[k, 0, x.len()], key).unwrap();
        let mut kept = x.to_vec();
        // In parts, because pieces are applied in parts.
        for (i, part) in kept.chunks_mut(1000).enumerate() {
            trim[0].apply(i * 1000, part);
        }
        assert_eq!(kept, by_sorting(x, k), "k = {k} of {}", x.len());
        assert_eq!(trim[1..], [Trim::NONE, Trim::ALL]);
        for (i, v) in x.iter().enumerate() {
            assert!(!trim[0].keeps(v.to_bits() & MAGNITUDE, i) || kept[i] == *v);
        }
    }

    /// Pseudorandom values, at most `distinct` different ones.
    fn values(n: usize, distinct: u32, seed: u64) -> Vec<f32> {
        let mut words = vec![0; n];
        crate::tensor::Stream::new(seed, "w", "m").fill(0, &mut words);
        words.iter().map(|w| ((u32::from(*w) % distinct) as f32 - distinct as f32 / 3.0) / 7.0).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn exactly_the_k_largest_with_ties_to_the_lowest_index(
            n in 1usize..200_000, distinct in 1u32..5000, share in 0.0f64..1.1, seed: u64, parallel: bool
        ) {
            check(&values(n, distinct, seed), (n as f64 * share) as usize, parallel);
        }
    }

    /// A misleading sample: all large values are outside of it, so the estimate is wrong and must be discarded.
    #[test]
    fn a_wrong_guess_is_found_out() {
        let mut x = vec![0.001f32; 300_000];
        for (i, v) in x.iter_mut().enumerate() {
            *v += i as f32 * 1e-9;
        }
        x[7] = 1e9;
        x[299_998] = f32::MIN_POSITIVE;
        for k in [1, 2, 3, 150_000, 299_999] {
            check(&x, k, false);
        }
        check(&vec![0.0; 300_000], 1234, true);
    }
}
