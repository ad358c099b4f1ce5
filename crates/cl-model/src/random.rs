use std::path::Path;

use cl_adapters::normal;
use cl_torch::tch::Tensor;
use serde_json::{Map, Value};

use crate::build::build;
use crate::config::ModelConfig;
use crate::{Decoder, LoadOptions, ModelError};

/// Creates a model with the shape of `config` (the content of config.json) and random weights. As in Transformers,
/// matrices and embeddings are normal with mean 0 and standard deviation 0.02, norms are 1 and biases 0.
///
/// The values of each tensor depend only on `seed` and its name.
///
/// # Errors
/// [`ModelError::Architecture`], [`ModelError::Config`].
pub fn random_weights(config: &Map<String, Value>, seed: u64, options: LoadOptions) -> Result<Decoder, ModelError> {
    let config = ModelConfig::from_json(Path::new("(in memory)"), config)?;
    let offset = config.norm_offset; // norm weights are offsets from 1
    build(config, options, &|name, shape| {
        let n = shape.iter().product::<i64>() as usize;
        let values = match (name.ends_with(".bias"), shape.len()) {
            (true, _) => vec![0.0; n],
            (false, 1) => vec![if offset { 0.0 } else { 1.0 }; n],
            _ => normal(seed, name, n).into_iter().map(|x| 0.02 * x).collect(),
        };
        Ok(Tensor::from_slice(&values).reshape(shape).to_device(options.device).to_kind(options.weights))
    })
}
