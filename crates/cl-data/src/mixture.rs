use serde::{Deserialize, Serialize};

use crate::Profile;
use crate::numpy::{Mt19937, random_state};

/// What a round trains on beside its own task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Mixture {
    /// Nothing.
    #[default]
    None,
    /// Examples of each earlier task, as many as `fraction` of the current task's.
    Replay {
        /// Share of the current task's rows, for each earlier task.
        fraction: f64,
    },
    /// All tasks at once.
    Joint {
        /// How often each is gone through.
        upsampling: Upsampling,
    },
}

/// How tasks of different sizes share a joint mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upsampling {
    /// Each row once.
    Natural,
    /// Each task as many rows as the largest has, in whole copies rounded up (the paper: 79 copies of 5,000 beside 395,000).
    Uniform,
}

/// One row of one of several data sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowRef {
    /// Which data set.
    pub dataset: usize,
    /// Which row of it.
    pub row: usize,
}

/// How many rows of each data set an epoch takes; the last data set is the round's own.
///
/// Replay gives earlier set i the weight wᵢ = fraction·Nₙ/Nᵢ and so round(wᵢ·Nᵢ) rows, with Python's rounding of halves to
/// even numbers.
pub fn plan(sizes: &[usize], mixture: &Mixture) -> Vec<usize> {
    let Some((&own, earlier)) = sizes.split_last() else { return Vec::new() };
    match *mixture {
        Mixture::None => std::iter::repeat_n(0, earlier.len()).chain([own]).collect(),
        Mixture::Replay { fraction } => {
            let replayed = earlier.iter().map(|&n| {
                if n == 0 {
                    return 0;
                }
                let weight = fraction * own as f64 / n as f64;
                (weight * n as f64).round_ties_even() as usize
            });
            replayed.chain([own]).collect()
        }
        Mixture::Joint { upsampling: Upsampling::Natural } => sizes.to_vec(),
        Mixture::Joint { upsampling: Upsampling::Uniform } => {
            let largest = sizes.iter().copied().max().unwrap_or(0);
            sizes.iter().map(|&n| if n == 0 { 0 } else { largest.div_ceil(n) * n }).collect()
        }
    }
}

/// The rows of an epoch (from 0), in order: `lengths[i]` rows of data set i, drawn anew each epoch.
///
/// For each data set with n rows, c = ⌈L/n⌉ copies of it are permuted and the first L taken, so no row comes up more than c
/// times; all drawn rows are then permuted together. Under [`Profile::Paper`] the generator is NumPy's legacy one seeded with
/// Σᵢ (i+1)·Lᵢ + epoch, whatever `seed` is, as the paper's code does; under [`Profile::Method`] it is keyed by `seed` and epoch.
pub fn epoch_rows(sizes: &[usize], lengths: &[usize], epoch: u64, seed: u64, profile: Profile) -> Vec<RowRef> {
    let mut rng = match profile {
        Profile::Paper => {
            let sum: u64 = lengths.iter().enumerate().map(|(i, &l)| (i as u64 + 1) * l as u64).sum();
            random_state(sum + epoch)
        }
        Profile::Method => keyed(seed, epoch),
    };
    let mut rows = Vec::with_capacity(lengths.iter().sum());
    for (dataset, (&n, &length)) in sizes.iter().zip(lengths).enumerate() {
        if n == 0 || length == 0 {
            continue;
        }
        let copies = length.div_ceil(n);
        let drawn = rng.permutation(copies * n);
        rows.extend(drawn.into_iter().take(length).map(|i| RowRef { dataset, row: i % n }));
    }
    let order = rng.permutation(rows.len());
    order.into_iter().map(|i| rows[i]).collect()
}

/// The rows of one data set in a seeded order, anew each epoch.
pub fn shuffled(rows: usize, epoch: u64, seed: u64) -> Vec<usize> {
    keyed(seed, epoch).permutation(rows)
}

fn keyed(seed: u64, epoch: u64) -> Mt19937 {
    Mt19937::from_key(&[seed as u32, (seed >> 32) as u32, epoch as u32, (epoch >> 32) as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_the_paper() {
        let replay = Mixture::Replay { fraction: 0.1 };
        assert_eq!(plan(&[5000; 6], &replay), [500, 500, 500, 500, 500, 5000]);
        let mut sizes = vec![5000; 6];
        sizes.push(395_000);
        let last = plan(&sizes, &replay);
        assert_eq!(last, [39_500, 39_500, 39_500, 39_500, 39_500, 39_500, 395_000]);
        assert_eq!(last.iter().sum::<usize>(), 632_000);
        let joint = plan(&sizes, &Mixture::Joint { upsampling: Upsampling::Uniform });
        assert_eq!(joint.iter().sum::<usize>(), 2_765_000);
        assert_eq!(plan(&[7, 9], &Mixture::None), [0, 9]);
    }

    #[test]
    fn no_row_comes_up_more_often_than_copies_allow() {
        for profile in [Profile::Paper, Profile::Method] {
            let rows = epoch_rows(&[10, 30], &[25, 30], 3, 7, profile);
            let mut counts = std::collections::HashMap::new();
            for row in &rows {
                *counts.entry(*row).or_insert(0) += 1;
            }
            assert_eq!(rows.len(), 55);
            assert!(counts.iter().all(|(row, &n)| n <= if row.dataset == 0 { 3 } else { 1 }));
            assert_ne!(rows, epoch_rows(&[10, 30], &[25, 30], 4, 7, profile), "drawn anew each epoch");
        }
    }
}
