use std::path::Path;

use cl_torch::tch::Tensor;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Map, Value};

use crate::config::ModelConfig;
use crate::load::build;
use crate::{Decoder, LoadOptions, ModelError};

/// A model with the shape of `config` (the content of a config.json) and fresh weights: matrices and embeddings normal
/// with mean 0 and standard deviation 0.02, norms 1, biases 0, as Transformers starts a model.
///
/// Each tensor's numbers depend on `seed` and its name only.
///
/// # Errors
/// [`ModelError::Architecture`], [`ModelError::Config`].
pub fn random_weights(config: &Map<String, Value>, seed: u64, options: LoadOptions) -> Result<Decoder, ModelError> {
    let config = ModelConfig::from_json(Path::new("(in memory)"), config)?;
    build(config, options, &|name, shape| {
        let n = shape.iter().product::<i64>() as usize;
        let values = match (name.ends_with(".bias"), shape.len()) {
            (true, _) => vec![0.0; n],
            (false, 1) => vec![1.0; n],
            _ => normal(seed, name, n).into_iter().map(|x| 0.02 * x).collect(),
        };
        Ok(Tensor::from_slice(&values).reshape(shape).to_device(options.device).to_kind(options.weights))
    })
}

/// Standard normal numbers (Box and Muller, 1958) from a generator keyed by seed and name.
fn normal(seed: u64, name: &str, n: usize) -> Vec<f32> {
    let key = name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
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
