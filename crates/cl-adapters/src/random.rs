//! Random numbers that depend only on a seed and the name of a layer or tensor.

use cl_checkpoint::seed::{FNV_OFFSET, fnv1a, splitmix64};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Returns `n` uniform numbers in ±`bound`.
pub(crate) fn uniform(seed: u64, name: &str, n: usize, bound: f64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(splitmix64(seed) ^ name_key(name));
    let mut unit = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    (0..n).map(|_| (bound * (2.0 * unit() - 1.0)) as f32).collect()
}

/// Returns `n` standard normal numbers (Box and Muller, 1958) from a generator keyed by seed and name.
pub fn normal(seed: u64, name: &str, n: usize) -> Vec<f32> {
    let key = fnv1a(seed ^ FNV_OFFSET, name);
    let mut rng = ChaCha8Rng::seed_from_u64(key);
    let mut unit = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let mut out = Vec::with_capacity(n + 1);
    while out.len() < n {
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), 2.0 * std::f64::consts::PI * unit());
        out.push((radius * angle.cos()) as f32);
        out.push((radius * angle.sin()) as f32);
    }
    out.truncate(n);
    out
}

/// Hash of a module's name, which is part of the seed of its random numbers.
pub(crate) fn name_key(name: &str) -> u64 {
    fnv1a(FNV_OFFSET, name)
}
