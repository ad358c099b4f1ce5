//! Few-shot examples as drawn by lm-eval: Python's `random.Random(1234).sample`, once for each document in order.

use std::collections::HashSet;

use cl_data::Row;
use cl_data::numpy::Mt19937;
use serde::{Deserialize, Serialize};

/// How a document's few-shot examples are chosen from a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sampler {
    /// Drawn at random for each document.
    #[default]
    Random,
    /// The first n rows.
    FirstN,
}

/// Draws the few-shot examples of each document, in the order of documents.
pub(crate) struct ShotSampler<'a> {
    pool: Vec<&'a Row>,
    sampler: Sampler,
    exclude_document: bool,
    random: PythonRandom,
}

/// The pool does not have enough rows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooFew {
    pub(crate) wanted: usize,
    pub(crate) available: usize,
}

impl<'a> ShotSampler<'a> {
    /// Creates a sampler. With `exclude_document`, a document is never its own example; as in lm-eval, one more example
    /// than needed is then drawn.
    pub(crate) fn new(pool: Vec<&'a Row>, sampler: Sampler, exclude_document: bool, seed: u32) -> ShotSampler<'a> {
        ShotSampler { pool, sampler, exclude_document, random: PythonRandom::new(seed) }
    }

    /// Draws the next document's examples, and returns their indices in the pool.
    pub(crate) fn draw(&mut self, document: &Row, n: usize) -> Result<Vec<usize>, TooFew> {
        let others = |pool: &[&Row]| (0..pool.len()).filter(|&i| pool[i] != document).collect::<Vec<_>>();
        match self.sampler {
            _ if n == 0 => Ok(Vec::new()),
            Sampler::FirstN => {
                let all = if self.exclude_document { others(&self.pool) } else { (0..self.pool.len()).collect() };
                all.get(..n).map(<[_]>::to_vec).ok_or(TooFew { wanted: n, available: all.len() })
            }
            Sampler::Random if self.exclude_document => {
                let mut drawn = self.sample(self.pool.len(), n + 1)?;
                drawn.retain(|&i| self.pool[i] != document);
                drawn.truncate(n);
                if drawn.len() < n {
                    // The document occurs in the pool more than once, and several of these rows were drawn.
                    let others = others(&self.pool);
                    drawn = self.sample(others.len(), n)?.into_iter().map(|i| others[i]).collect();
                }
                Ok(drawn)
            }
            Sampler::Random => self.sample(self.pool.len(), n),
        }
    }

    fn sample(&mut self, available: usize, wanted: usize) -> Result<Vec<usize>, TooFew> {
        if wanted > available {
            return Err(TooFew { wanted, available });
        }
        Ok(self.random.sample(available, wanted))
    }
}

/// Python's `random.Random(seed)`.
pub(crate) struct PythonRandom(Mt19937);

impl PythonRandom {
    pub(crate) fn new(seed: u32) -> PythonRandom {
        PythonRandom(Mt19937::from_key(&[seed]))
    }

    /// Python's `_randbelow`: draws as many bits as n has, until the result is below n.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let draw = (self.0.next_u32() >> (32 - bits)) as usize;
            if draw < n {
                return draw;
            }
        }
    }

    /// Returns the indices of `sample(range(n), k)` in CPython 3.11 and later; k ≤ n < 2³².
    pub(crate) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // Python copies the population if that is smaller than a set of the selected indices.
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow((k as f64 * 3.0).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let drawn = pool[j];
                    pool[j] = pool[n - i - 1];
                    drawn
                })
                .collect();
        }
        let mut selected = HashSet::new();
        let mut drawn = Vec::with_capacity(k);
        while drawn.len() < k {
            let j = self.below(n);
            if selected.insert(j) {
                drawn.push(j);
            }
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_as_python_does() {
        // Written by tests/fixtures/make_metrics.py.
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/fixtures/python_sample.json")).unwrap();
        let mut random = (None, PythonRandom::new(0));
        for draw in fixture["draws"].as_array().unwrap() {
            let (seed, n, k, expected): (u32, usize, usize, Vec<usize>) = serde_json::from_value(draw.clone()).unwrap();
            if random.0 != Some(seed) {
                random = (Some(seed), PythonRandom::new(seed));
            }
            assert_eq!(random.1.sample(n, k), expected, "seed {seed}, {k} of {n}");
        }
    }
}
