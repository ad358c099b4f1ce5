//! Few-shot examples as lm-eval draws them: Python's `random.Random(1234).sample`, once for every document in order.

use std::collections::HashSet;

use cl_data::numpy::Mt19937;

/// Python's `random.Random(seed)`.
pub(crate) struct PythonRandom(Mt19937);

impl PythonRandom {
    pub(crate) fn new(seed: u32) -> PythonRandom {
        PythonRandom(Mt19937::from_key(&[seed]))
    }

    /// `_randbelow`: as many bits as n has, until they are below n.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let draw = (self.0.next_u32() >> (32 - bits)) as usize;
            if draw < n {
                return draw;
            }
        }
    }

    /// Indices of `sample(range(n), k)` in CPython 3.11 and later; k ≤ n < 2³².
    pub(crate) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // Python copies the population when that is smaller than a set of the drawn.
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
            serde_json::from_str(include_str!("../tests/fixtures/python_sample.json")).unwrap();
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
