//! Bootstrap confidence intervals of differences between two runs on the same documents.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

/// Settings of a bootstrap.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resampling {
    /// Number of resamples.
    pub resamples: usize,
    /// Random seed.
    pub seed: u64,
    /// Confidence level of the intervals, between 0 and 1.
    pub level: f64,
}

impl Default for Resampling {
    /// Returns 10,000 resamples, seed 1234, level 0.95.
    fn default() -> Self {
        Resampling { resamples: 10_000, seed: 1234, level: 0.95 }
    }
}

impl Resampling {
    /// Whether there is at least one resample, and the level is between 0 and 1.
    pub fn is_valid(&self) -> bool {
        self.resamples > 0 && self.level > 0.0 && self.level < 1.0
    }
}

/// A value with its bootstrap confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// Estimates the mean of b − a over documents, with the percentile interval of the paired bootstrap.
///
/// ```text
/// d*_r = mean over n documents, drawn with replacement, of (b_i − a_i),   r = 1 … resamples
/// [low, high] = the quantiles (1 − level)/2 and (1 + level)/2 of d*, interpolated linearly between neighbours
/// ```
///
/// Each document is drawn with both of its scores, so its difficulty, which affects both runs, cancels. Random numbers
/// are those of ChaCha8; `stream`, such as the name of a task, selects an independent sequence, so that the result does
/// not depend on what else is compared. Swapping the runs negates every number exactly.
///
/// Returns `None` if there are no documents, the lists differ in length, or `resampling` is not
/// [valid](Resampling::is_valid).
///
/// Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13; corresponds to
/// `scipy.stats.bootstrap` with `paired=True, method="percentile"`.
///
/// ```
/// use cl_eval::{Resampling, paired_difference};
/// let (a, b) = ([0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]);
/// let difference = paired_difference(&a, &b, "facts", Resampling::default()).unwrap();
/// assert_eq!((difference.value, difference.low, difference.high), (0.5, 0.0, 1.0));
/// assert_eq!(paired_difference(&a, &a, "facts", Resampling::default()).unwrap().high, 0.0);
/// ```
pub fn paired_difference(a: &[f64], b: &[f64], stream: &str, resampling: Resampling) -> Option<Estimate> {
    if a.is_empty() || a.len() != b.len() || !resampling.is_valid() {
        return None;
    }
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| b - a).collect();
    let means = resampled_means(&[&differences], stream, resampling).swap_remove(0);
    Some(interval(mean(b) - mean(a), means, resampling.level))
}

/// Returns the means of each list in each resample; all lists share the drawn documents.
pub(crate) fn resampled_means(lists: &[&[f64]], stream: &str, resampling: Resampling) -> Vec<Vec<f64>> {
    let n = lists.first().map_or(0, |l| l.len());
    let mut random = ChaCha8Rng::seed_from_u64(resampling.seed);
    random.set_stream(stream_number(stream));
    let mut means = vec![Vec::with_capacity(resampling.resamples); lists.len()];
    let mut sums = vec![0.0; lists.len()];
    for _ in 0..resampling.resamples {
        sums.fill(0.0);
        for _ in 0..n {
            let drawn = below(&mut random, n);
            sums.iter_mut().zip(lists).for_each(|(sum, list)| *sum += list[drawn]);
        }
        means.iter_mut().zip(&sums).for_each(|(means, sum)| means.push(sum / n as f64));
    }
    means
}

/// Returns the percentile interval of resampled values.
pub(crate) fn interval(value: f64, mut resampled: Vec<f64>, level: f64) -> Estimate {
    let tail = (1.0 - level) / 2.0;
    resampled.sort_by(f64::total_cmp);
    let low = quantile(resampled.iter().copied(), tail);
    // Computed from the other end, so that swapping the runs mirrors the interval to the last bit.
    let high = quantile(resampled.iter().rev().copied(), tail);
    // A resampled mean of zeros may be -0.
    Estimate { value: value + 0.0, low: low + 0.0, high: high + 0.0 }
}

/// Computes the mean, summing in the same order as for a task's scores, so that the results are identical.
pub(crate) fn mean(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.iter().sum::<f64>() / values.len() as f64
}

/// Quantile by NumPy's default method: linear interpolation at (n − 1)·share.
fn quantile(mut values: impl ExactSizeIterator<Item = f64>, share: f64) -> f64 {
    let place = (values.len() - 1) as f64 * share;
    let first = values.nth(place as usize).unwrap_or(f64::NAN);
    let next = values.next().unwrap_or(first);
    first + (next - first) * place.fract()
}

/// Returns a random integer below n: the high half of a product. The bias of 2⁻⁶⁴·n is negligible.
fn below(random: &mut ChaCha8Rng, n: usize) -> usize {
    ((u128::from(random.next_u64()) * n as u128) >> 64) as usize
}

fn stream_number(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    hash.as_bytes()[..8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
