use serde::{Deserialize, Serialize};

use crate::Profile;
use crate::numpy::{Mt19937, random_state};
use crate::problem::MixtureProblem;

/// How an epoch is composed of the round's own data sets and of replayed rows from earlier rounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mixture {
    /// How the round's own data sets are combined.
    #[serde(default)]
    pub joint: Joint,
    /// Replay of earlier rounds; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

/// How many rows of each data set an epoch uses. Set i has Nᵢ rows, N = ΣNᵢ, and an epoch uses Lᵢ of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Joint {
    /// Every row once: Lᵢ = Nᵢ.
    #[default]
    Natural,
    /// Upsamples all sets to the size of the largest, in whole copies, rounded up: Lᵢ = ⌈max N / Nᵢ⌉·Nᵢ. This is the
    /// paper's joint training, which uses 79 copies of 5,000 rows with 395,000 others.
    Uniform,
    /// N rows with the given proportions, one weight per set: Lᵢ ∝ wᵢ.
    Weights(Vec<f64>),
    /// N rows with Lᵢ ∝ Nᵢ^(1/T): natural proportions at T = 1, equal shares for T → ∞ (1/T is alpha in mT5,
    /// arXiv:2010.11934).
    Temperature(f64),
}

/// Replay of rows from earlier rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    /// Number of rows per earlier round, as a fraction of the round's own rows per epoch.
    pub fraction: f64,
    /// Which rows are replayed.
    #[serde(default)]
    pub buffer: Buffer,
}

/// Whether the replayed rows change between epochs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Buffer {
    /// Sampled again from all rows for each epoch, as in the paper's code.
    #[default]
    Redrawn,
    /// Sampled once: the same rows in all epochs and later rounds, as with a memory of fixed size.
    Fixed,
}

/// A row of one of several data sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowRef {
    /// Index of the data set.
    pub dataset: usize,
    /// Index of the row.
    pub row: usize,
}

/// The rows of a data set that an epoch uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Number of rows of the set.
    pub rows: usize,
    /// Number of rows per epoch.
    pub take: usize,
    /// Random seed if rows are sampled once; `None` if they are sampled again for each epoch.
    pub fixed: Option<u64>,
}

impl Mixture {
    /// Checks the settings for a round with `sets` own data sets.
    ///
    /// # Errors
    /// Returns the first setting that is out of range.
    pub fn validate(&self, sets: usize) -> Result<(), MixtureProblem> {
        if let Some(r) = self.replay.filter(|r| !(r.fraction > 0.0 && r.fraction <= 100.0)) {
            return Err(MixtureProblem::Fraction { fraction: r.fraction });
        }
        match &self.joint {
            Joint::Weights(weights) if weights.len() != sets => {
                Err(MixtureProblem::WeightCount { weights: weights.len(), sets })
            }
            Joint::Weights(weights)
                if weights.iter().any(|w| !(0.0..=1e9).contains(w)) || weights.iter().sum::<f64>() <= 0.0 =>
            {
                Err(MixtureProblem::Weights { weights: weights.clone() })
            }
            Joint::Temperature(t) if !(0.01..=1e9).contains(t) => Err(MixtureProblem::Temperature { temperature: *t }),
            _ => Ok(()),
        }
    }

    /// Returns the number of rows that an epoch uses of each data set: first those of each earlier round, then the
    /// round's own.
    ///
    /// An earlier round contributes round(f·L) rows, where L is the number of rows of the round's own data (half to
    /// even, as in Python). If that round has several data sets, they contribute in proportion to their sizes.
    ///
    /// ```
    /// use cl_data::{Buffer, Joint, Mixture, Replay};
    ///
    /// let replay = Replay { fraction: 0.1, buffer: Buffer::Redrawn };
    /// let mixture = Mixture { replay: Some(replay), ..Mixture::default() };
    /// assert_eq!(mixture.rows_per_epoch(&[vec![5000], vec![600, 400]], &[5000]), [500, 300, 200, 5000]);
    /// let mixture = Mixture { joint: Joint::Uniform, replay: None };
    /// assert_eq!(mixture.rows_per_epoch(&[], &[5000, 395_000]), [395_000, 395_000]);
    /// ```
    pub fn rows_per_epoch(&self, earlier: &[Vec<usize>], own: &[usize]) -> Vec<usize> {
        let own = self.joint.rows_per_epoch(own);
        let total: usize = own.iter().sum();
        let replayed = earlier.iter().flat_map(|sizes| match (self.replay, sizes.iter().sum::<usize>()) {
            (Some(replay), rows) if rows > 0 => {
                // The paper's code first computes a weight of the earlier set, which affects the rounding of halves.
                let weight = replay.fraction * total as f64 / rows as f64;
                let wanted = (weight * rows as f64).round_ties_even() as usize;
                shares(wanted, &sizes.iter().map(|&n| n as f64).collect::<Vec<_>>())
            }
            _ => vec![0; sizes.len()],
        });
        replayed.chain(own.iter().copied()).collect()
    }
}

impl Joint {
    fn rows_per_epoch(&self, sizes: &[usize]) -> Vec<usize> {
        let total = sizes.iter().sum();
        // An empty set contributes nothing, regardless of its weight.
        let weighted = |weight: &dyn Fn(usize) -> f64| {
            let weights = sizes.iter().enumerate().map(|(i, &n)| if n == 0 { 0.0 } else { weight(i) });
            shares(total, &weights.collect::<Vec<_>>())
        };
        match self {
            Joint::Natural => sizes.to_vec(),
            Joint::Uniform => {
                let largest = sizes.iter().copied().max().unwrap_or(0);
                sizes.iter().map(|&n| if n == 0 { 0 } else { largest.div_ceil(n) * n }).collect()
            }
            Joint::Weights(weights) => weighted(&|i| weights.get(i).copied().unwrap_or(0.0)),
            Joint::Temperature(t) => weighted(&|i| (sizes[i] as f64).powf(1.0 / t)),
        }
    }
}

/// Distributes `total` in proportion to weights: shares are rounded down, and the rest goes to the largest remainders,
/// in order if they are equal.
fn shares(total: usize, weights: &[f64]) -> Vec<usize> {
    let sum: f64 = weights.iter().sum();
    if sum <= 0.0 {
        return vec![0; weights.len()];
    }
    let exact: Vec<f64> = weights.iter().map(|w| total as f64 * (w / sum)).collect();
    let mut shares: Vec<usize> = exact.iter().map(|e| e.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
    order.sort_by(|&a, &b| (exact[b] - exact[b].floor()).total_cmp(&(exact[a] - exact[a].floor())));
    let missing = total.saturating_sub(shares.iter().sum());
    for &i in order.iter().cycle().take(missing) {
        shares[i] += 1;
    }
    shares
}

/// Returns the rows of an epoch (from 0), in order: `take` rows of each data set, sampled again for each epoch unless
/// they are fixed.
///
/// For each data set with n rows, c = ⌈take/n⌉ copies are permuted and the first `take` are kept, so no row occurs more
/// than c times; then all rows are permuted together. With [`Profile::Paper`], the generator is NumPy's legacy one,
/// seeded with Σᵢ (i+1)·takeᵢ + epoch regardless of `seed`, as in the paper's code; with [`Profile::Method`], it is
/// seeded with `seed` and the epoch. The rows of a fixed set depend on its own seed and its index.
pub fn epoch_rows(sets: &[Draw], epoch: u64, seed: u64, profile: Profile) -> Vec<RowRef> {
    let mut rng = match profile {
        Profile::Paper => {
            let sum: u64 = sets.iter().enumerate().map(|(i, set)| (i as u64 + 1) * set.take as u64).sum();
            random_state(sum + epoch)
        }
        Profile::Method | Profile::Mergekit => keyed(seed, epoch),
    };
    let mut rows = Vec::with_capacity(sets.iter().map(|set| set.take).sum());
    for (dataset, set) in sets.iter().enumerate().filter(|(_, set)| set.rows > 0 && set.take > 0) {
        let places = set.take.div_ceil(set.rows) * set.rows;
        let drawn = match set.fixed {
            Some(seed) => keyed(seed, dataset as u64).permutation(places),
            None => rng.permutation(places),
        };
        rows.extend(drawn.into_iter().take(set.take).map(|i| RowRef { dataset, row: i % set.rows }));
    }
    let order = rng.permutation(rows.len());
    order.into_iter().map(|i| rows[i]).collect()
}

/// Returns the rows of one data set in random order, determined by seed and epoch.
pub fn shuffled(rows: usize, epoch: u64, seed: u64) -> Vec<usize> {
    keyed(seed, epoch).permutation(rows)
}

fn keyed(seed: u64, epoch: u64) -> Mt19937 {
    Mt19937::from_key(&[seed as u32, (seed >> 32) as u32, epoch as u32, (epoch >> 32) as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joint(joint: Joint, sizes: &[usize]) -> Vec<usize> {
        Mixture { joint, replay: None }.rows_per_epoch(&[], sizes)
    }

    fn draw(rows: usize, take: usize) -> Draw {
        Draw { rows, take, fixed: None }
    }

    #[test]
    fn row_counts_of_the_paper() {
        let replay = Some(Replay { fraction: 0.1, buffer: Buffer::Redrawn });
        let mixture = Mixture { replay, ..Mixture::default() };
        let earlier = vec![vec![5000]; 6];
        assert_eq!(mixture.rows_per_epoch(&earlier[..5], &[5000]), [500, 500, 500, 500, 500, 5000]);
        let last = mixture.rows_per_epoch(&earlier, &[395_000]);
        assert_eq!(last, [39_500, 39_500, 39_500, 39_500, 39_500, 39_500, 395_000]);
        assert_eq!(last.iter().sum::<usize>(), 632_000);
        let seven: Vec<usize> = std::iter::repeat_n(5000, 6).chain([395_000]).collect();
        assert_eq!(joint(Joint::Uniform, &seven).iter().sum::<usize>(), 2_765_000);
        assert_eq!(Mixture::default().rows_per_epoch(&[vec![7]], &[9]), [0, 9]);
    }

    #[test]
    fn shares_are_exact() {
        for joint_kind in [Joint::Natural, Joint::Temperature(1.0), Joint::Weights(vec![10.0, 20.0, 71.0])] {
            assert_eq!(joint(joint_kind, &[10, 20, 71]), [10, 20, 71]);
        }
        assert_eq!(joint(Joint::Weights(vec![1.0, 1.0, 1.0]), &[10, 20, 71]), [34, 34, 33]);
        assert_eq!(joint(Joint::Temperature(1e9), &[1, 100]), [50, 51]);
        assert_eq!(joint(Joint::Weights(vec![0.0, 3.0]), &[5, 5]), [0, 10]);
        assert_eq!(joint(Joint::Temperature(2.0), &[0, 4]), [0, 4]);
    }

    #[test]
    fn wrong_numbers_are_named() {
        let fraction =
            |fraction| Mixture { replay: Some(Replay { fraction, buffer: Buffer::Fixed }), ..Mixture::default() };
        let joint = |joint| Mixture { joint, replay: None };
        for (mixture, part) in [
            (fraction(f64::NAN), "replay.fraction = NaN"),
            (fraction(-1.0), "replay.fraction = -1"),
            (joint(Joint::Weights(vec![1.0])), "1 for 2 data sets"),
            (joint(Joint::Weights(vec![0.0, 0.0])), "not all 0"),
            (joint(Joint::Weights(vec![f64::INFINITY, 0.0])), "from 0 to 1e9"),
            (joint(Joint::Temperature(0.0)), "temperature = 0"),
        ] {
            let message = mixture.validate(2).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn no_row_comes_up_more_often_than_copies_allow() {
        for profile in [Profile::Paper, Profile::Method] {
            let sets = [draw(10, 25), draw(30, 30)];
            let rows = epoch_rows(&sets, 3, 7, profile);
            let mut counts = std::collections::HashMap::new();
            for row in &rows {
                *counts.entry(*row).or_insert(0) += 1;
            }
            assert_eq!(rows.len(), 55);
            assert!(counts.iter().all(|(row, &n)| n <= if row.dataset == 0 { 3 } else { 1 }));
            assert_ne!(rows, epoch_rows(&sets, 4, 7, profile), "drawn anew each epoch");
        }
    }

    #[test]
    fn fixed_rows_stay_over_epochs_and_rounds() {
        let buffered = |epoch, seed, take| {
            let sets = [Draw { fixed: Some(42), ..draw(100, take) }, draw(50, 50)];
            let rows = epoch_rows(&sets, epoch, seed, Profile::Method);
            rows.into_iter().filter(|r| r.dataset == 0).map(|r| r.row).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(buffered(0, 1, 10), buffered(5, 2, 10));
        assert!(buffered(0, 1, 10).is_subset(&buffered(0, 3, 20)), "a smaller buffer is a part of a larger one");
    }
}
