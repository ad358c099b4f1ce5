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

    /// Indices of `sample(range(n), k)`, k ≤ n < 2³².
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
    fn as_python_draws() {
        // r = random.Random(1234); [r.sample(range(7473), 5), r.sample(range(7473), 5), r.sample(range(10), 3),
        //   r.sample(range(100), 8)]   (CPython 3.11)
        let mut r = PythonRandom::new(1234);
        let draws = [r.sample(7473, 5), r.sample(7473, 5), r.sample(10, 3), r.sample(100, 8)];
        assert_eq!(draws[0], [6374, 3610, 957, 61, 742]);
        assert_eq!(draws[1], [7462, 6610, 4769, 286, 5501]);
        assert_eq!(draws[2], [1, 9, 5]);
        assert_eq!(draws[3], [30, 2, 3, 44, 82, 79, 61, 78]);
    }
}
