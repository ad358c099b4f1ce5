//! The k largest of many values, exactly k of them: of equal values those with the lowest index are kept.
//!
//! Differences of bf16 weights take few distinct values, so thousands can lie exactly at the threshold; who is kept must not
//! depend on the order in which a sort happens to leave them.

use std::borrow::Cow;
use std::ops::{Range, RangeInclusive};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::group::{Piece, TensorGroup, runs};
use super::kernels;
use crate::Error;

/// Which elements of a tensor are kept, by magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    /// Key of the smallest value that is kept. A key is the bit pattern of a magnitude.
    pub threshold: u32,
    /// Elements exactly at the threshold are kept before this flat index.
    pub ties_end: usize,
}

impl Trim {
    /// Keeps everything.
    pub const ALL: Trim = Trim { threshold: 0, ties_end: usize::MAX };
    /// Keeps nothing.
    pub const NONE: Trim = Trim { threshold: u32::MAX, ties_end: 0 };

    /// Whether an element is kept.
    pub fn keeps(&self, key: u32, index: usize) -> bool {
        key > self.threshold || (key == self.threshold && index < self.ties_end)
    }

    /// Sets to zero what is not kept of the values from flat index `start` on.
    pub fn apply(&self, start: usize, x: &mut [f32]) {
        let end = start + x.len();
        if end <= self.ties_end {
            return kernels::keep_from(x, self.threshold);
        }
        let (with_ties, without) = x.split_at_mut(self.ties_end.saturating_sub(start));
        kernels::keep_from(with_ties, self.threshold);
        kernels::keep_from(without, self.threshold.saturating_add(1));
    }
}

/// Keys to choose from, in runs of pieces that are read together; several tensors' may follow each other.
pub(crate) trait Keys: Sync {
    /// Elements in each run.
    fn lengths(&self) -> Vec<usize>;
    /// Calls `f(request, keys)` for every request on every piece of a run, or on about `part` elements of the run. A request's
    /// keys come in order.
    fn with_keys(&self, run: usize, part: Option<usize>, f: &mut dyn FnMut(usize, &[u32])) -> Result<(), Error>;
    /// Maps runs, in parallel where that is allowed; results in order.
    fn map<R: Send>(&self, indices: &[usize], f: impl Fn(usize) -> Result<R, Error> + Sync) -> Result<Vec<R>, Error>;
}

/// Where a request's smallest kept value lies: its key, and run and place of the end of the kept ties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) threshold: u32,
    /// Ties are kept in all runs before this one, …
    pub(crate) run: usize,
    /// … and in it before this place.
    pub(crate) place: usize,
}

const ALL: Cut = Cut { threshold: 0, run: usize::MAX, place: 0 };
const NONE: Cut = Cut { threshold: u32::MAX, run: 0, place: 0 };

/// Bits that a key has; the sign bit of a value's bits does not count.
const MAGNITUDE: u32 = 0x7fff_ffff;
/// The largest key.
const LARGEST: u32 = MAGNITUDE;
/// Keys that one pass collects at most; beyond that it counts, which costs another pass but no memory.
const COLLECTED: usize = 4 << 20;
/// Elements looked at to guess where thresholds lie.
const SAMPLE: usize = 16_384;
/// Buckets of one round of narrowing.
const BUCKETS: usize = 4096;

/// A request under way: the threshold lies in `low..=high`, and `above` keys are larger than `high`.
///
/// `values` are the keys in it that a sample saw most often: differences of bf16 weights are multiples of a step, so that a few
/// values can make up nearly all of a bracket, and to count these takes far less than to collect them.
#[derive(Clone, Copy)]
struct Bracket {
    k: usize,
    low: u32,
    high: u32,
    values: [u32; 4],
}

/// A place for a value that no key has.
const NO_VALUE: u32 = u32::MAX;

/// The most frequent of some keys, where they are frequent enough to be worth counting.
fn frequent(mut keys: Vec<u32>) -> [u32; 4] {
    let least = keys.len() / 64 + 2;
    keys.sort_unstable();
    let mut runs: Vec<(usize, u32)> = keys.chunk_by(|a, b| a == b).map(|run| (run.len(), run[0])).collect();
    runs.retain(|(n, _)| *n >= least);
    runs.sort_unstable_by_key(|run| std::cmp::Reverse(*run));
    let mut values = [NO_VALUE; 4];
    values.iter_mut().zip(runs).for_each(|(value, (_, key))| *value = key);
    values
}

/// A bracket without known values.
fn bracket(k: usize, low: u32, high: u32) -> Bracket {
    Bracket { k, low, high, values: [NO_VALUE; 4] }
}

/// For each request the cut that keeps its `k` largest keys.
pub(crate) fn largest(keys: &impl Keys, k: &[usize]) -> Result<Vec<Cut>, Error> {
    let lengths = keys.lengths();
    let total: usize = lengths.iter().sum();
    let mut cuts: Vec<Option<Cut>> = k
        .iter()
        .map(|&k| match k {
            0 => Some(NONE),
            k if k >= total => Some(ALL),
            _ => None,
        })
        .collect();
    if cuts.iter().all(Option::is_some) {
        return Ok(cuts.into_iter().flatten().collect());
    }
    let mut brackets = guess(keys, k, &lengths, total)?;
    // A guess is good but for rare cases; after that, every round divides the bracket by the number of buckets.
    for _ in 0..8 {
        let open: Vec<usize> = (0..cuts.len()).filter(|&r| cuts[r].is_none()).collect();
        if open.is_empty() {
            break;
        }
        let passes = pass(keys, &brackets, &open, lengths.len())?;
        for (request, found) in open.into_iter().zip(passes) {
            match found {
                Found::Cut(cut) => cuts[request] = Some(cut),
                Found::Narrower(bracket) => brackets[request] = bracket,
            }
        }
    }
    let cuts: Vec<Cut> = cuts.into_iter().map(|cut| cut.expect("narrowing ends at single keys")).collect();
    cuts.into_iter().enumerate().map(|(request, cut)| place(keys, request, cut)).collect()
}

enum Found {
    /// `place` still counts kept ties of the run.
    Cut(Cut),
    Narrower(Bracket),
}

/// A bracket for every request from a sample, wide enough to be wrong hardly ever.
fn guess(keys: &impl Keys, k: &[usize], lengths: &[usize], total: usize) -> Result<Vec<Bracket>, Error> {
    let everything = |k: &usize| bracket(*k, 0, LARGEST);
    if total <= 4 * SAMPLE {
        return Ok(k.iter().map(everything).collect());
    }
    // A little of many runs: neighbours are more alike than others.
    let step = lengths.len().div_ceil(64);
    let chosen: Vec<usize> = (0..lengths.len()).step_by(step).collect();
    let part = SAMPLE / chosen.len();
    let samples = keys.map(&chosen, |run| {
        let mut samples = vec![Vec::new(); k.len()];
        keys.with_keys(run, Some(part), &mut |request, keys| {
            // Where only whole rows can be read these are more; an odd step walks through all columns.
            let stride = (keys.len() / part).max(1) | 1;
            samples[request].extend(keys.iter().step_by(stride).map(|key| key & MAGNITUDE));
        })?;
        Ok(samples)
    })?;
    let guess = |(request, k): (usize, &usize)| {
        let mut sample: Vec<u32> = samples.iter().flat_map(|run| run[request].iter().copied()).collect();
        let n = sample.len() as f64;
        let share = *k as f64 / total as f64;
        // Six standard deviations of the rank of a quantile in a random sample; weights near each other are alike.
        let slack = 6.0 * (n * share * (1.0 - share)).sqrt() + 16.0;
        let (first, last) = (share * n - slack, share * n + slack);
        let mut at = |rank: f64| *sample.select_nth_unstable_by(rank as usize, |a, b| b.cmp(a)).1;
        let high = if first < 0.0 { LARGEST } else { at(first) };
        let low = if last >= n { 0 } else { at(last) };
        let values = frequent(sample.into_iter().filter(|key| (low..=high).contains(key)).collect());
        Bracket { values, ..bracket(*k, low, high) }
    };
    Ok(k.iter().enumerate().map(guess).collect())
}

/// What a pass over one run found for one request.
#[derive(Default)]
struct Tally {
    above: usize,
    held: Held,
}

/// The keys in the bracket: so many of each of its frequent values, and the others, where they are not so many that they are
/// counted by bucket, together with those of other runs.
#[derive(Default)]
struct Held {
    frequent: [u32; 4],
    others: Vec<u32>,
}

/// One pass over all runs for all open requests.
fn pass(keys: &impl Keys, brackets: &[Bracket], open: &[usize], runs: usize) -> Result<Vec<Found>, Error> {
    let all: Vec<usize> = (0..runs).collect();
    // A bracket over everything would collect everything: count first.
    let total: usize = keys.lengths().iter().sum();
    let collected = AtomicUsize::new(0);
    let counts: Vec<Mutex<Vec<usize>>> = brackets.iter().map(|_| Mutex::new(Vec::new())).collect();
    let add = |tally: &mut Tally, request: usize, keys: &[u32], marks: &mut Vec<u8>| {
        let bracket = brackets[request];
        marks.clear();
        marks.resize(keys.len().next_multiple_of(8), 0);
        let (above, frequent) = kernels::tally(keys, bracket.low, bracket.high, bracket.values, marks);
        tally.above += above as usize;
        tally.held.frequent.iter_mut().zip(frequent).for_each(|(sum, n)| *sum += n);
        let narrow = bracket.low > 0 || bracket.high < LARGEST || total <= 4 * SAMPLE;
        let marked = marked(marks).map(|i| keys[i] & MAGNITUDE);
        if !narrow || collected.load(Ordering::Relaxed) > COLLECTED {
            let mut sums = counts[request].lock().expect("no panic while held");
            sums.resize(BUCKETS, 0);
            count_buckets(marked, bracket, &mut sums);
        } else {
            let before = tally.held.others.len();
            tally.held.others.extend(marked);
            collected.fetch_add(tally.held.others.len() - before, Ordering::Relaxed);
        }
    };
    let tallies = keys.map(&all, |run| {
        let mut tallies: Vec<Tally> = open.iter().map(|_| Tally::default()).collect();
        let mut marks = Vec::new();
        keys.with_keys(run, None, &mut |request, keys| {
            if let Some(place) = open.iter().position(|&r| r == request) {
                add(&mut tallies[place], request, keys, &mut marks);
            }
        })?;
        Ok(tallies)
    })?;
    let mut counts: Vec<Vec<usize>> =
        counts.into_iter().map(|sums| sums.into_inner().expect("no panic while held")).collect();
    let conclusion = |(i, &request): (usize, &usize)| {
        conclude(brackets[request], std::mem::take(&mut counts[request]), tallies.iter().map(|t| &t[i]))
    };
    Ok(open.iter().enumerate().map(conclusion).collect())
}

/// The places that are marked, in order; eight at a time are passed over where none is.
fn marked(marks: &[u8]) -> impl Iterator<Item = usize> {
    marks.chunks_exact(8).enumerate().flat_map(|(i, eight)| {
        let mut bits = u64::from_le_bytes(eight.try_into().expect("eight bytes"));
        std::iter::from_fn(move || {
            let bit = (bits != 0).then(|| bits.trailing_zeros())?;
            bits &= bits - 1;
            Some(8 * i + bit as usize / 8)
        })
    })
}

/// Width of a bucket of the bracket.
fn width(bracket: Bracket) -> u32 {
    ((u64::from(bracket.high - bracket.low) + 1).div_ceil(BUCKETS as u64)) as u32
}

fn count_buckets(keys: impl Iterator<Item = u32>, bracket: Bracket, counts: &mut [usize]) {
    let width = width(bracket);
    for key in keys {
        counts[((key - bracket.low) / width) as usize] += 1;
    }
}

/// The cut, when the bracket held it and its keys were collected; else a narrower bracket that holds it.
///
/// `counts` are of the keys that were counted by bucket.
fn conclude<'t>(bracket: Bracket, mut counts: Vec<usize>, tallies: impl Iterator<Item = &'t Tally> + Clone) -> Found {
    let Bracket { k, low, high, .. } = bracket;
    let above: usize = tallies.clone().map(|t| t.above).sum();
    if above >= k {
        return Found::Narrower(self::bracket(k, high + 1, LARGEST));
    }
    let width = width(bracket);
    let counted = !counts.is_empty();
    counts.resize(BUCKETS, 0);
    for tally in tallies.clone() {
        tally.held.each(&bracket, |key, n| counts[((key - low) / width) as usize] += n);
    }
    if above + counts.iter().sum::<usize>() < k {
        return Found::Narrower(self::bracket(k, 0, low.saturating_sub(1)));
    }
    let (bucket, larger) = bucket_of(&counts, k, above);
    let bucket_low = low + bucket as u32 * width;
    let bucket_high = high.min(bucket_low.saturating_add(width - 1));
    if counted {
        let mut narrower = self::bracket(k, bucket_low, bucket_high);
        if bucket_low == bucket_high {
            narrower.values[0] = bucket_low;
        }
        return Found::Narrower(narrower);
    }
    let range = bucket_low..=bucket_high;
    let (threshold, mut quota) = threshold(&bracket, tallies.clone(), range, k - larger);
    for (run, tally) in tallies.enumerate() {
        let mut ties = 0;
        tally.held.each(&bracket, |key, n| ties += if key == threshold { n } else { 0 });
        if ties >= quota {
            return Found::Cut(Cut { threshold, run, place: quota });
        }
        quota -= ties;
    }
    unreachable!("there are as many ties as the rank says")
}

impl Held {
    /// Every key, with how many there are of it.
    fn each(&self, bracket: &Bracket, mut f: impl FnMut(u32, usize)) {
        bracket.values.iter().zip(self.frequent).filter(|(_, n)| *n > 0).for_each(|(&key, n)| f(key, n as usize));
        self.others.iter().for_each(|&key| f(key, 1));
    }
}

/// The bucket that holds the `k`-th largest, and how many keys are in those above it or beyond all.
fn bucket_of(counts: &[usize], k: usize, above: usize) -> (usize, usize) {
    let mut larger = above;
    for (bucket, &n) in counts.iter().enumerate().rev() {
        if larger + n >= k {
            return (bucket, larger);
        }
        larger += n;
    }
    unreachable!("the bracket holds it")
}

/// The `rank`-th largest key in a range, counted from 1, and how many keys equal to it are among the `rank` largest.
fn threshold<'t>(
    bracket: &Bracket,
    tallies: impl Iterator<Item = &'t Tally>,
    range: RangeInclusive<u32>,
    rank: usize,
) -> (u32, usize) {
    let mut keys: Vec<(u32, usize)> = Vec::new();
    for tally in tallies {
        tally.held.each(bracket, |key, n| {
            if range.contains(&key) && n > 0 {
                keys.push((key, n));
            }
        });
    }
    keys.sort_unstable_by_key(|(key, _)| std::cmp::Reverse(*key));
    let mut left = rank;
    for equal in keys.chunk_by(|a, b| a.0 == b.0) {
        let n: usize = equal.iter().map(|(_, n)| n).sum();
        if n >= left {
            return (equal[0].0, left);
        }
        left -= n;
    }
    unreachable!("the range holds it")
}

/// Turns a count of kept ties of a run into a place in it.
fn place(keys: &impl Keys, request: usize, cut: Cut) -> Result<Cut, Error> {
    if cut == ALL || cut == NONE {
        return Ok(cut);
    }
    let (mut passed, mut left, mut end) = (0, cut.place, 0);
    keys.with_keys(cut.run, None, &mut |r, keys| {
        if r == request {
            for (i, _) in keys.iter().enumerate().filter(|&(_, &key)| key & MAGNITUDE == cut.threshold).take(left) {
                left -= 1;
                end = passed + i + 1;
            }
            passed += keys.len();
        }
    })?;
    Ok(Cut { place: end, ..cut })
}

/// Pieces that are read together.
type Run = Vec<Range<usize>>;

fn runs_of(group: &TensorGroup<'_>, whole_rows: bool) -> Vec<Run> {
    runs(&group.pieces(whole_rows)).into_iter().map(<[_]>::to_vec).collect()
}

fn length(run: &Run) -> usize {
    run.iter().map(Range::len).sum()
}

/// So many elements in the middle of a run, or, where whole rows are needed, the piece in the middle; all of it without a part.
fn part_of(run: &Run, part: Option<usize>, whole_rows: bool) -> Cow<'_, [Range<usize>]> {
    let Some(part) = part else { return Cow::Borrowed(run) };
    if whole_rows {
        return Cow::Borrowed(&run[run.len() / 2..][..1]);
    }
    let part = part.min(length(run));
    let start = run[0].start + (length(run) - part) / 2;
    Cow::Owned(std::iter::once(start..start + part).collect())
}

/// The runs of one tensor, with a function that makes a request's keys.
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

/// Bits of values; as keys they order like magnitudes.
pub(crate) fn bits(values: &[f32]) -> &[u32] {
    bytemuck::cast_slice(values)
}

/// For each entry of `k`, one per model, what keeps the `k` entries of greatest magnitude of that model's task vector.
///
/// # Errors
/// Those of reading.
pub fn keep_largest_changes(group: &TensorGroup<'_>, k: &[usize]) -> Result<Vec<Trim>, Error> {
    keep(group, false, true, k, |piece, model, f| f(bits(&piece.models[model])))
}

/// For each entry of `k` what keeps the `k` largest keys of a tensor.
///
/// `key(piece, request, keys)` writes a piece's keys for that request; it is called with the requests in order, on the same
/// piece, and may overwrite the piece. `whole_rows` as in [`TensorGroup::pieces`].
///
/// # Errors
/// Those of reading.
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

/// As [`keep_largest`], with keys that need not be written anywhere. Their sign bit does not count.
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

/// The runs of all tensors of a model, in order of tensors: what trimming over the whole model ranks.
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

/// For each tensor, and in it for each model, what the trim of the whole model keeps: of every model the `⌊density · N⌋`
/// entries of greatest magnitude among all its `N` task-vector entries.
///
/// # Errors
/// Those of reading.
pub fn trim_models(groups: &[TensorGroup<'_>], density: &[f64]) -> Result<Vec<Vec<Trim>>, Error> {
    let places: Vec<(usize, Run)> = groups
        .iter()
        .enumerate()
        .flat_map(|(i, group)| runs_of(group, false).into_iter().map(move |run| (i, run)))
        .collect();
    let total: usize = places.iter().map(|(_, run)| length(run)).sum();
    let keys = ModelKeys { groups, places, models: density.len() };
    let k: Vec<usize> = density.iter().map(|&d| crate::methods::kept(d, total)).collect();
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

    /// What a full sort keeps: the larger magnitude first, then the lower index.
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
        let group = TensorGroup { name: "w", shape: &shape, base: None, models, parallel, model_trims: None };
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

    /// Values by a recipe: how many distinct ones, and how they are spread.
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

    /// A sample that misleads: all large values hide where it does not look, so the guess has to be given up.
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
