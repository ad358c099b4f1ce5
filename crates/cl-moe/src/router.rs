//! Router initialization: one row per layer and expert, `(experts, hidden)`, f32.

use cl_checkpoint::{Checkpoint, Dtype, SafetensorsFile, TensorSource, TensorSpec, convert};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::Value;

use crate::{Error, MixConfig, RouterInit};

/// Prefix of the tensor names in a file of hidden states, followed by the layer. A tensor is `(experts, hidden)` in
/// f32; the row of an expert is the mean over its positive prompts minus the mean over its negative ones.
pub const ROUTER_STATES: &str = "layers.";
/// The same prefix for the shared expert, `(1, hidden)`, if it has prompts.
pub const SHARED_STATES: &str = "shared_expert.layers.";

/// The tensors in a mixture's file of hidden states: those of all layers, then those of the shared expert.
pub fn router_states_spec(config: &MixConfig, layers: usize, hidden: usize) -> Vec<TensorSpec> {
    let shared = config.shared_expert.as_ref().is_some_and(|shared| !shared.positive_prompts.is_empty());
    let rows = [(ROUTER_STATES, config.experts.len()), (SHARED_STATES, 1)];
    let of = |(start, rows): (&str, usize)| {
        let spec = |layer| TensorSpec { name: format!("{start}{layer}"), dtype: Dtype::F32, shape: vec![rows, hidden] };
        (0..layers).map(spec).collect::<Vec<TensorSpec>>()
    };
    rows[..1 + usize::from(shared)].iter().copied().flat_map(of).collect()
}

/// Initial router weights of a mixture, layer by layer.
pub(crate) struct RouterRows {
    init: RouterInit,
    gateless: bool,
    seed: u64,
    experts: usize,
    hidden: usize,
    states: Option<SafetensorsFile>,
}

/// Standard deviation of random rows: `initializer_range` of the models that mixtures are made of.
const DEVIATION: f64 = 0.02;

impl RouterRows {
    /// Checks that everything is available that the initialization needs.
    pub(crate) fn new(config: &MixConfig, base: &Checkpoint) -> Result<RouterRows, Error> {
        let number = |key: &str| base.config().get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let (experts, hidden) = (config.experts.len(), number("hidden_size"));
        let states = open_states(config)?;
        if let Some(file) = &states {
            for spec in router_states_spec(config, number("num_hidden_layers"), hidden) {
                let info = file.info(&spec.name);
                if !info.is_some_and(|i| i.shape == spec.shape && i.dtype == spec.dtype) {
                    let (path, tensor, expected) = (file.path().to_owned(), spec.name, spec.shape);
                    return Err(Error::RouterStates { path, tensor, expected });
                }
            }
        }
        Ok(RouterRows {
            init: config.router.init,
            gateless: config.gateless,
            seed: config.router.seed,
            experts,
            hidden,
            states,
        })
    }

    /// Returns the rows of a layer's router with `input` columns, one after another. `name` distinguishes random
    /// routers of one layer; the router of an MLP has none.
    pub(crate) fn rows(&self, layer: usize, name: Option<&str>, input: usize) -> Result<Vec<f32>, Error> {
        match (self.init, &self.states) {
            (RouterInit::Random, _) => {
                let key = name.map_or_else(|| (layer as u64).to_le_bytes().to_vec(), |name| name.as_bytes().to_vec());
                Ok(normal(self.seed, &key, self.experts * input))
            }
            (RouterInit::Uniform | RouterInit::TaskVectors, _) | (RouterInit::States, None) => {
                Ok(vec![0.0; self.experts * input])
            }
            (RouterInit::Base, _) => {
                let row = |expert| vec![if expert == 0 { 1.0 } else { 1e-6 }; input];
                Ok((0..self.experts).flat_map(row).collect())
            }
            (RouterInit::States, Some(file)) => self.directions(file, &format!("{ROUTER_STATES}{layer}")),
        }
    }

    /// Returns the gate of a layer's shared expert with `input` columns: the direction of its prompts' hidden states.
    pub(crate) fn shared_gate(&self, layer: usize, input: usize) -> Result<Vec<f32>, Error> {
        match &self.states {
            Some(file) => self.directions(file, &format!("{SHARED_STATES}{layer}")),
            None => Ok(vec![0.0; input]),
        }
    }

    /// Reads a tensor of hidden states and normalizes each row to length 1.
    fn directions(&self, file: &SafetensorsFile, tensor: &str) -> Result<Vec<f32>, Error> {
        let mut rows = convert::to_f32(Dtype::F32, file.bytes(tensor)?).expect("checked to be f32");
        rows.chunks_exact_mut(self.hidden).for_each(normalize);
        Ok(rows)
    }

    /// Notes for the user about the initialization.
    pub(crate) fn notes(&self) -> Vec<String> {
        match self.init {
            _ if self.gateless => Vec::new(),
            RouterInit::Uniform => {
                vec!["router: all logits are 0, so every token goes to the first experts".to_owned()]
            }
            RouterInit::Random => vec!["router: random; train it, or every token goes to experts by chance".to_owned()],
            _ => Vec::new(),
        }
    }
}

/// Opens the file of hidden states, if the initialization needs one.
fn open_states(config: &MixConfig) -> Result<Option<SafetensorsFile>, Error> {
    match &config.router.states {
        Some(file) if config.router.init == RouterInit::States => Ok(Some(SafetensorsFile::open(file)?)),
        _ => Ok(None),
    }
}

/// Normalizes a row to length 1; a row of zeros is unchanged.
fn normalize(row: &mut [f32]) {
    let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

/// Returns normal numbers (Box and Muller) for one router; they depend only on the seed and the router's `key`.
pub(crate) fn normal(seed: u64, key: &[u8], count: usize) -> Vec<f32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(key);
    let mut rng = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    let mut unit = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let (radius, angle) = ((-2.0 * libm::log(unit())).sqrt(), 2.0 * std::f64::consts::PI * unit());
        values.push((DEVIATION * radius * libm::cos(angle)) as f32);
        values.push((DEVIATION * radius * libm::sin(angle)) as f32);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_rows_are_normal_and_differ_from_layer_to_layer() {
        let values = normal(1399, b"0", 20_000);
        let mean = values.iter().sum::<f32>() / 20_000.0;
        let deviation = (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / 20_000.0).sqrt();
        // Standard errors for 20,000 numbers: 1.4e-4 and 1e-4.
        assert!(mean.abs() < 6e-4 && (deviation - 0.02).abs() < 4e-4, "{mean} {deviation}");
        assert_ne!(values[..5], normal(1399, b"1", 5));
        assert_eq!(values[..5], normal(1399, b"0", 5));
    }

    #[test]
    fn rows_of_states_have_length_one() {
        let mut row = [3.0, 4.0];
        normalize(&mut row);
        assert_eq!(row, [0.6, 0.8]);
        let mut zero = [0.0; 2];
        normalize(&mut zero);
        assert_eq!(zero, [0.0; 2]);
    }
}
