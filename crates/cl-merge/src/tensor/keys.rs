//! Exact selection of the k largest of many keys; ties go to the first.
//!
//! Keys are read in passes and are never all in memory: a sample estimates the k-th largest, a pass counts the keys
//! above it and collects those near it; if the estimate was wrong or too many were collected, another pass follows.

use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::kernels;
use crate::Error;

/// Keys to select from, in runs of pieces that are read together; the runs of several tensors can follow each other.
pub(super) trait Keys: Sync {
    /// Number of elements in each run.
    fn lengths(&self) -> Vec<usize>;
    /// Calls `f(request, keys)` for every request on every piece of a run, or on about `part` elements of the run. The
    /// keys of a request are passed in order.
    fn with_keys(&self, run: usize, part: Option<usize>, f: &mut dyn FnMut(usize, &[u32])) -> Result<(), Error>;
    /// Maps runs, in parallel if allowed; returns the results in order.
    fn map<R: Send>(&self, indices: &[usize], f: impl Fn(usize) -> Result<R, Error> + Sync) -> Result<Vec<R>, Error>;
}

/// The smallest kept key of a request, and the run and the position at which kept ties end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) threshold: u32,
    /// Ties are kept in all runs before this one.
    pub(super) run: usize,
    /// Ties in `run` are kept before this position.
    pub(super) place: usize,
}

pub(super) const ALL: Cut = Cut { threshold: 0, run: usize::MAX, place: 0 };
pub(super) const NONE: Cut = Cut { threshold: u32::MAX, run: 0, place: 0 };

/// Bit mask of a key; the sign bit of a value is ignored.
pub(super) const MAGNITUDE: u32 = 0x7fff_ffff;
/// The largest key.
const LARGEST: u32 = MAGNITUDE;
/// Maximum number of keys that one pass collects; beyond that it only counts keys, which costs another pass but no
/// memory.
const COLLECTED: usize = 4 << 20;
/// Number of elements in the sample that estimates thresholds.
const SAMPLE: usize = 8192;
/// Number of buckets into which a pass divides a bracket.
const BUCKETS: usize = 4096;

/// An unfinished request: the threshold is assumed to lie in `low..=high`.
///
/// `values` are the most frequent keys of the bracket in a sample. Differences of bf16 weights are multiples of a step,
/// so a few values can make up nearly all of a bracket, and counting them is much cheaper than collecting them.
#[derive(Clone, Copy)]
struct Bracket {
    k: usize,
    low: u32,
    high: u32,
    values: [u32; 4],
}

/// Placeholder for a frequent value; no key has this value.
const NO_VALUE: u32 = u32::MAX;

/// The most frequent keys, if they are frequent enough to be worth counting.
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

/// A bracket without frequent values.
fn bracket(k: usize, low: u32, high: u32) -> Bracket {
    Bracket { k, low, high, values: [NO_VALUE; 4] }
}

/// For each request, the cut that keeps its `k` largest keys.
pub(super) fn largest(keys: &impl Keys, k: &[usize]) -> Result<Vec<Cut>, Error> {
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
    // The estimate is rarely wrong; after that, every pass divides the width of the bracket by the number of buckets.
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
    /// The cut, in which `place` is still the number of kept ties in the run.
    Cut(Cut),
    Narrower(Bracket),
}

/// Estimates a bracket for every request from a sample, wide enough to be rarely wrong.
fn guess(keys: &impl Keys, k: &[usize], lengths: &[usize], total: usize) -> Result<Vec<Bracket>, Error> {
    let everything = |k: &usize| bracket(*k, 0, LARGEST);
    if total <= 4 * SAMPLE {
        return Ok(k.iter().map(everything).collect());
    }
    // Samples a few elements of many runs, because neighbouring elements are more similar than others.
    let step = lengths.len().div_ceil(64);
    let chosen: Vec<usize> = (0..lengths.len()).step_by(step).collect();
    let part = SAMPLE / chosen.len();
    let samples = keys.map(&chosen, |run| {
        let mut samples = vec![Vec::new(); k.len()];
        keys.with_keys(run, Some(part), &mut |request, keys| {
            // If only whole rows can be read, there are more keys; an odd stride visits all columns.
            let stride = (keys.len() / part).max(1) | 1;
            samples[request].extend(keys.iter().step_by(stride).map(|key| key & MAGNITUDE));
        })?;
        Ok(samples)
    })?;
    let guess = |(request, k): (usize, &usize)| {
        let mut sample: Vec<u32> = samples.iter().flat_map(|run| run[request].iter().copied()).collect();
        let n = sample.len() as f64;
        let share = *k as f64 / total as f64;
        // Four standard deviations of the rank of a quantile in a random sample. A wrong estimate costs one more pass;
        // a wider bracket adds keys to collect in every pass.
        let slack = 4.0 * (n * share * (1.0 - share)).sqrt() + 16.0;
        let (first, last) = (share * n - slack, share * n + slack);
        let mut at = |rank: f64| *sample.select_nth_unstable_by(rank as usize, |a, b| b.cmp(a)).1;
        let high = if first < 0.0 { LARGEST } else { at(first) };
        let low = if last >= n { 0 } else { at(last) };
        let values = frequent(sample.into_iter().filter(|key| (low..=high).contains(key)).collect());
        Bracket { values, ..bracket(*k, low, high) }
    };
    Ok(k.iter().enumerate().map(guess).collect())
}

/// Result of a pass over one run for one request.
#[derive(Default)]
struct Tally {
    above: usize,
    held: Held,
}

/// The keys in the bracket: the number of each frequent value, and the other keys, unless there are so many that they
/// are counted by bucket, together with those of other runs.
#[derive(Default)]
struct Held {
    frequent: [u32; 4],
    others: Vec<u32>,
}

/// One pass over all runs for all open requests.
fn pass(keys: &impl Keys, brackets: &[Bracket], open: &[usize], runs: usize) -> Result<Vec<Found>, Error> {
    let all: Vec<usize> = (0..runs).collect();
    // A bracket over all keys would collect all of them, so keys are counted first.
    let total: usize = keys.lengths().iter().sum();
    let collected = AtomicUsize::new(0);
    let counts: Vec<Mutex<Vec<usize>>> = brackets.iter().map(|_| Mutex::new(Vec::new())).collect();
    let add = |tally: &mut Tally, request: usize, keys: &[u32], marks: &mut Vec<u8>| {
        let bracket = brackets[request];
        marks.resize(keys.len().next_multiple_of(8), 0);
        marks[keys.len()..].fill(0);
        let (above, frequent) = kernels::tally(keys, bracket.low, bracket.high, bracket.values, marks);
        tally.above += above as usize;
        tally.held.frequent.iter_mut().zip(frequent).for_each(|(sum, n)| *sum += n);
        let narrow = bracket.low > 0 || bracket.high < LARGEST || total <= 4 * SAMPLE;
        if !narrow || collected.load(Ordering::Relaxed) > COLLECTED {
            let mut sums = counts[request].lock().expect("no panic while held");
            sums.resize(BUCKETS, 0);
            let width = width(bracket);
            each_marked(marks, |i| sums[(((keys[i] & MAGNITUDE) - bracket.low) / width) as usize] += 1);
        } else {
            let before = tally.held.others.len();
            each_marked(marks, |i| tally.held.others.push(keys[i] & MAGNITUDE));
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

/// Calls `f` with the positions that are marked, in order; eight unmarked positions are skipped at a time.
#[inline]
fn each_marked(marks: &[u8], mut f: impl FnMut(usize)) {
    for (i, eight) in marks.as_chunks::<8>().0.iter().enumerate() {
        let mut bits = u64::from_le_bytes(*eight);
        while bits != 0 {
            f(8 * i + bits.trailing_zeros() as usize / 8);
            bits &= bits - 1;
        }
    }
}

/// Width of the buckets of a bracket.
fn width(bracket: Bracket) -> u32 {
    ((u64::from(bracket.high - bracket.low) + 1).div_ceil(BUCKETS as u64)) as u32
}

/// Returns the cut if the bracket contains it and its keys were collected, otherwise a bracket for the next pass.
///
/// `counts` contains the keys that were counted by bucket.
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
    /// Calls `f` with each key and its count.
    fn each(&self, bracket: &Bracket, mut f: impl FnMut(u32, usize)) {
        bracket.values.iter().zip(self.frequent).filter(|(_, n)| *n > 0).for_each(|(&key, n)| f(key, n as usize));
        self.others.iter().for_each(|&key| f(key, 1));
    }
}

/// The bucket that contains the `k`-th largest key, and the number of keys in higher buckets or above the bracket.
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

/// The `rank`-th largest key in a range, counted from 1, and the number of keys equal to it among the `rank` largest.
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

/// Converts the number of kept ties in a run to the position at which they end.
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
