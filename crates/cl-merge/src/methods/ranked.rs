//! Masks by rank, as in DELLA (Deep et al., arXiv 2406.11617): the larger an entry is among those of its row, the more
//! likely it is kept.

use crate::tensor::kernels::{self, Chance};

/// Buffers for ranking the entries of a row by magnitude. Of equal magnitudes, the first has the lowest rank.
#[derive(Default)]
pub(super) struct Ranking {
    /// Key of a magnitude in the upper half and its index in the lower half.
    entries: Vec<u64>,
    /// The bucket of each entry of the row.
    buckets: Vec<u32>,
    /// Number of entries in the buckets before each bucket; at the end, the number of all entries.
    starts: Vec<u32>,
    /// The probability of keeping each entry of the row.
    chances: Vec<Chance>,
}

/// Buckets with more entries than this are sorted separately; insertion sort handles the others.
const LARGE_BUCKET: u32 = 32;

impl Ranking {
    /// Keeps each entry of a row with the probability of its rank and sets the others to zero. If `divide`, kept
    /// entries are divided by their probability. `chances` has one entry per rank, starting with the smallest
    /// magnitude.
    pub(super) fn keep(&mut self, row: &mut [f32], random: &[u16], chances: &[Chance], divide: bool) {
        self.sort(row);
        self.chances.resize(row.len(), Chance::default());
        for (entry, chance) in self.entries.iter().zip(chances) {
            self.chances[(entry & 0xffff_ffff) as usize] = *chance;
        }
        if divide {
            kernels::keep_and_divide(row, random, &self.chances);
        } else {
            kernels::keep_by_chance(row, random, &self.chances);
        }
    }

    /// Sorts the row's entries by ascending magnitude into `entries`, as key and index.
    ///
    /// Entries are distributed over buckets of equal width, about one bucket for two entries, which leaves little to
    /// sort.
    fn sort(&mut self, row: &[f32]) {
        let entry = |i: usize, x: f32| u64::from(x.to_bits() & 0x7fff_ffff) << 32 | i as u64;
        let count = row.len().next_power_of_two() / 2;
        self.entries.clear();
        if !self.fill_buckets(row, count) {
            self.entries.extend(row.iter().enumerate().map(|(i, &x)| entry(i, x)));
            self.entries.sort_unstable();
            return;
        }
        self.entries.resize(row.len(), 0);
        for (i, (&x, &bucket)) in row.iter().zip(&self.buckets).enumerate() {
            let place = &mut self.starts[bucket as usize];
            self.entries[*place as usize] = entry(i, x);
            *place += 1;
        }
        // Each start has become the end of its bucket.
        let mut start = 0;
        for &end in &self.starts[..count] {
            if end - start > LARGE_BUCKET {
                self.entries[start as usize..end as usize].sort_unstable();
            }
            start = end;
        }
        insertion_sort(&mut self.entries);
    }

    /// Puts a row's entries into `count` buckets of equal width, in `buckets` and `starts`. Returns `false` for short
    /// rows, and if the largest magnitude is zero or not finite.
    fn fill_buckets(&mut self, row: &[f32], count: usize) -> bool {
        let largest = f32::from_bits(kernels::largest_key(row));
        let scale = (count as f32 - 1.0) / largest;
        if row.len() < 64 || !scale.is_finite() || !largest.is_finite() {
            return false;
        }
        self.buckets.resize(row.len(), 0);
        kernels::buckets(row, scale, &mut self.buckets);
        self.starts.clear();
        self.starts.resize(count + 1, 0);
        self.buckets.iter().for_each(|&bucket| self.starts[bucket as usize + 1] += 1);
        let mut end = 0;
        for start in &mut self.starts {
            end += *start;
            *start = end;
        }
        true
    }
}

/// Insertion sort, which is fast if no entry is far from its sorted position.
fn insertion_sort(entries: &mut [u64]) {
    for i in 1..entries.len() {
        let entry = entries[i];
        let mut place = i;
        while place > 0 && entries[place - 1] > entry {
            entries[place] = entries[place - 1];
            place -= 1;
        }
        entries[place] = entry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Stream;

    /// Rows that fill the buckets evenly, or with ties, zeros or one outlier.
    fn rows() -> Vec<Vec<f32>> {
        let mut words = vec![0; 5000];
        Stream::new(3, "w", "m").fill(0, &mut words);
        let values: Vec<f32> = words.iter().map(|&w| f32::from(w) / 65_536.0 - 0.5).collect();
        let shapes: [fn(f32) -> f32; 7] = [
            |x| x,
            |x| x.powi(9),
            |x| (x * 8.0).round() / 8.0,
            |x| (x * 100.0).round() / 100.0,
            |x| if x > 0.4 { x } else { 0.0 },
            |x| x * f32::MIN_POSITIVE,
            |_| 0.0,
        ];
        let mut rows = Vec::new();
        for shape in shapes {
            for n in [1, 2, 63, 64, 65, 576, 5000] {
                for outlier in [0.0, 1e30, f32::INFINITY] {
                    let mut row: Vec<f32> = values[..n].iter().map(|&x| shape(x)).collect();
                    row[n / 2] += outlier;
                    rows.push(row);
                }
            }
        }
        rows
    }

    fn sorted(row: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[a].abs().total_cmp(&row[b].abs()));
        order
    }

    #[test]
    fn ranks_are_those_of_a_sort() {
        let mut ranking = Ranking::default();
        for row in rows() {
            ranking.sort(&row);
            let ranked: Vec<usize> = ranking.entries.iter().map(|entry| (entry & 0xffff_ffff) as usize).collect();
            assert_eq!(ranked, sorted(&row));
        }
    }

    /// Probabilities that increase slowly or over the whole range, are equal, or decrease.
    #[test]
    fn every_entry_is_kept_by_the_chance_of_its_rank() {
        let mut ranking = Ranking::default();
        for row in rows() {
            let mut random = vec![0; row.len()];
            Stream::new(4, "w", "m").fill(0, &mut random);
            for (first, last) in [(26_000.0, 39_000.0), (1.0, 65_535.0), (30_000.0, 30_000.0), (40_000.0, 20_000.0)] {
                let step = (last - first) / row.len().max(2) as f32;
                let chance = |rank: usize| (first + step * rank as f32) / 65_536.0;
                let chances: Vec<Chance> = (0..row.len())
                    .map(|rank| Chance { probability: chance(rank), bound: (chance(rank) * 65_536.0) as u32 })
                    .collect();
                for divide in [false, true] {
                    let mut expected = row.clone();
                    for (i, chance) in sorted(&row).into_iter().zip(&chances) {
                        let kept = u32::from(random[i]) < chance.bound;
                        expected[i] = match kept {
                            true if divide => row[i] / chance.probability,
                            true => row[i],
                            false => 0.0,
                        };
                    }
                    let mut kept = row.clone();
                    ranking.keep(&mut kept, &random, &chances, divide);
                    assert_eq!(kept, expected, "{} {first} {last} {divide}", row.len());
                }
            }
        }
    }
}
