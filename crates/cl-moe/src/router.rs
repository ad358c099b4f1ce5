//! Router initialization: one row per layer and expert, `(experts, hidden)`, f32.

use std::collections::{BTreeMap, HashMap};

use cl_checkpoint::files::{MAX_TOKENIZER, read_file};
use cl_checkpoint::{Checkpoint, Dtype, SafetensorsFile, TensorSource, TensorSpec, convert};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};

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

/// Key of [`router_states_metadata`]. There is only one, because the format does not keep the order of several.
const METADATA: &str = "router_states";
/// Number of bytes at either end of a tensor that identify a base.
const SAMPLE: usize = 4096;

/// The `__metadata__` of a mixture's file of hidden states, as [`safetensors::serialize`] takes it: the pooling, and
/// the hashes of the prompts and of the base, by which [`Plan`](crate::Plan) recognizes a file for something else. Of
/// the base, the tokenizer and both ends of each tensor are read.
///
/// # Errors
/// Returns [`Error::Checkpoint`] if a file of the base cannot be read.
pub fn router_states_metadata(config: &MixConfig, base: &Checkpoint) -> Result<HashMap<String, String>, Error> {
    let text = json!(origin(config, base)?).to_string();
    Ok(HashMap::from([(METADATA.to_owned(), text)]))
}

/// What hidden states depend on.
fn origin(config: &MixConfig, base: &Checkpoint) -> Result<BTreeMap<&'static str, String>, Error> {
    let pooling = json!(config.router.pooling.unwrap_or_default());
    let pooling = pooling.as_str().unwrap_or_default().to_owned();
    Ok(BTreeMap::from([("base", base_hash(base)?), ("pooling", pooling), ("prompts", prompts_hash(config))]))
}

fn prompts_hash(config: &MixConfig) -> String {
    let experts: Vec<Value> = config.experts.iter().map(|e| json!([e.positive_prompts, e.negative_prompts])).collect();
    let shared = config.shared_expert.as_ref().map(|e| json!([e.positive_prompts, e.negative_prompts]));
    let shared = shared.filter(|_| router_states_spec(config, 1, 1).len() > 1);
    blake3::hash(json!([experts, shared]).to_string().as_bytes()).to_hex().to_string()
}

fn base_hash(base: &Checkpoint) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    let mut names = base.names();
    names.sort_unstable();
    for name in names {
        let info = base.info(name).expect("one of its names");
        hasher.update(format!("{name}\0{:?}\0{:?}\0", info.dtype, info.shape).as_bytes());
        let bytes = info.elements() * info.dtype.bitsize() / 8;
        let mut sample = vec![0; bytes.min(SAMPLE)];
        for start in [0, bytes - sample.len()] {
            base.read(name, start, &mut sample)?;
            hasher.update(&sample);
        }
    }
    let tokenizer = base.dir().join("tokenizer.json");
    if tokenizer.is_file() {
        hasher.update(&read_file(&tokenizer, MAX_TOKENIZER)?);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Initial router weights of a mixture, layer by layer.
pub(crate) struct RouterRows {
    init: RouterInit,
    gateless: bool,
    seed: u64,
    experts: usize,
    hidden: usize,
    states: Option<SafetensorsFile>,
    /// Notes on the hidden states.
    notes: Vec<String>,
}

/// Standard deviation of random rows: `initializer_range` of the models that mixtures are made of.
const DEVIATION: f64 = 0.02;

impl RouterRows {
    /// Checks that everything is available that the initialization needs.
    pub(crate) fn new(config: &MixConfig, base: &Checkpoint) -> Result<RouterRows, Error> {
        let number = |key: &str| base.config().get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let (experts, hidden) = (config.experts.len(), number("hidden_size"));
        let (states, mut notes) = (open_states(config)?, Vec::new());
        if let Some(file) = &states {
            notes.extend(check_origin(file, config, base)?);
            let specs = router_states_spec(config, number("num_hidden_layers"), hidden);
            for spec in specs.clone() {
                let info = file.info(&spec.name);
                if !info.is_some_and(|i| i.shape == spec.shape && i.dtype == spec.dtype) {
                    let (path, tensor, expected) = (file.path().to_owned(), spec.name, spec.shape);
                    return Err(Error::RouterStates { path, tensor, expected });
                }
            }
            notes.extend(check_rows(file, config, &specs, hidden)?);
        }
        Ok(RouterRows {
            init: config.router.init,
            gateless: config.gateless,
            seed: config.router.seed,
            experts,
            hidden,
            states,
            notes,
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
        let mut notes = self.notes.clone();
        notes.extend(match self.init {
            _ if self.gateless => Vec::new(),
            RouterInit::Uniform => {
                vec!["router: all logits are 0, so every token goes to the first experts".to_owned()]
            }
            RouterInit::Random => vec!["router: random; train it, or every token goes to experts by chance".to_owned()],
            _ => Vec::new(),
        });
        notes
    }
}

/// Checks that a file of hidden states was made for this mixture, if it says what it was made for. Returns a note if it
/// decides something that the configuration leaves open.
fn check_origin(file: &SafetensorsFile, config: &MixConfig, base: &Checkpoint) -> Result<Option<String>, Error> {
    let Some(text) = file.metadata().get(METADATA) else { return Ok(None) };
    let found: BTreeMap<String, String> = serde_json::from_str(text).unwrap_or_default();
    let mut note = None;
    for (key, expected) in origin(config, base)? {
        let found = found.get(key).cloned().unwrap_or_else(|| "unknown".to_owned());
        if found == expected {
            continue;
        }
        let prompts = config.experts.iter().any(|e| !(e.positive_prompts.is_empty() && e.negative_prompts.is_empty()));
        match key {
            // `cl moe states --pooling` is the choice.
            "pooling" if config.router.pooling.is_none() => {
                note = Some(format!("{}: router.pooling is not set; the file's is {found}", file.path().display()));
            }
            "prompts" if !prompts => {}
            _ => return Err(Error::RouterStatesOrigin { path: file.path().to_owned(), key, found, expected }),
        }
    }
    Ok(note)
}

/// Checks that hidden states are finite. Returns notes on those that distinguish no experts.
fn check_rows(
    file: &SafetensorsFile,
    config: &MixConfig,
    specs: &[TensorSpec],
    hidden: usize,
) -> Result<Vec<String>, Error> {
    let named = |tensor: &str, row: usize| match tensor.strip_prefix(SHARED_STATES) {
        Some(_) => "shared_expert".to_owned(),
        None => format!("experts[{row}] ({})", config.experts[row].model.display()),
    };
    // The layers of experts whose row is zero, and of pairs of experts whose rows are equal.
    let (mut zero, mut equal) = (BTreeMap::<String, Vec<usize>>::new(), BTreeMap::<String, Vec<usize>>::new());
    let mut layers = 0;
    for TensorSpec { name, .. } in specs {
        let layer = name.rsplit('.').next().and_then(|layer| layer.parse().ok()).expect("a name of ours");
        layers = layers.max(layer + 1);
        let mut values = convert::to_f32(Dtype::F32, file.bytes(name)?).expect("checked to be f32");
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let (path, expert, value) = (file.path().to_owned(), named(name, index / hidden), values[index]);
            return Err(Error::RouterStatesValue { path, expert, layer, value });
        }
        values.chunks_exact_mut(hidden).for_each(normalize);
        let rows: Vec<&[f32]> = values.chunks_exact(hidden).collect();
        for (i, row) in rows.iter().enumerate() {
            if row.iter().all(|x| *x == 0.0) {
                zero.entry(named(name, i)).or_default().push(layer);
                continue;
            }
            for j in (i + 1..rows.len()).filter(|&j| rows[j] == *row) {
                equal.entry(format!("{} and {}", named(name, i), named(name, j))).or_default().push(layer);
            }
        }
    }
    let place = file.path().display();
    let of_layers = |of: &[usize]| {
        if of.len() == layers {
            return "all layers".to_owned();
        }
        let numbers: Vec<String> = of.iter().map(usize::to_string).collect();
        format!("layer{} {}", if of.len() == 1 { "" } else { "s" }, numbers.join(", "))
    };
    let zero = zero.iter().map(|(expert, of)| {
        let of = of_layers(of);
        format!(
            "{place}: the row of {expert} is zero in {of}, so its logits are 0; its prompts must differ from its \
             counterexamples"
        )
    });
    let equal = equal.iter().map(|(pair, of)| {
        let of = of_layers(of);
        format!(
            "{place}: the rows of {pair} are equal in {of}, so the router cannot tell these experts apart there; give them \
             other prompts"
        )
    });
    Ok(zero.chain(equal).collect())
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
