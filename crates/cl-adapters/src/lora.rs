use std::path::Path;

use cl_checkpoint::{Adapter, AdapterConfig, Dtype, Manifest, TensorSource, TensorSpec};
use cl_torch::tch::{Kind, Tensor};
use cl_torch::{load_tensor, tensor_bytes};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::Value;

use crate::dropout::mix;
use crate::{AdapterError, Linear, LoraConfig, Mode};

/// The two factors of one layer's update `ΔW = scaling · B·A`, kept in f32 whatever the layer computes in.
pub struct Lora {
    /// `[r, in]`, f32.
    pub a: Tensor,
    /// `[out, r]`, f32.
    pub b: Tensor,
    /// `lora_alpha / r`, or `lora_alpha / √r` with rsLoRA.
    pub scaling: f64,
    /// Probability of dropping an input element while training.
    pub dropout: f64,
    key: u64,
}

impl Lora {
    /// A fresh adapter for `layer`, as PEFT starts one: `A` uniform in ±1/√in (Kaiming-uniform with a = √5), `B` zero.
    ///
    /// The numbers depend on `seed` and the layer's name only.
    pub fn init(layer: &Linear, config: &LoraConfig, seed: u64) -> Lora {
        let (input, output) = layer.widths();
        let device = layer.weight.device();
        let bound = 1.0 / (input as f64).sqrt();
        let mut rng = ChaCha8Rng::seed_from_u64(mix(seed) ^ name_key(&layer.name));
        let values: Vec<f32> = (0..config.r * input)
            .map(|_| {
                let unit = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                (bound * (2.0 * unit - 1.0)) as f32
            })
            .collect();
        let a = Tensor::from_slice(&values).reshape([config.r, input]).to_device(device);
        let b = Tensor::zeros([output, config.r], (Kind::Float, device));
        Lora::new(a, b, config.scaling(), config.lora_dropout, &layer.name)
    }

    fn new(a: Tensor, b: Tensor, scaling: f64, dropout: f64, name: &str) -> Lora {
        Lora { a: a.set_requires_grad(true), b: b.set_requires_grad(true), scaling, dropout, key: name_key(name) }
    }

    /// Reads the factors of `layer` from a PEFT directory.
    ///
    /// # Errors
    /// [`AdapterError::Shape`] when they do not fit, or the directory's own error.
    pub fn load(layer: &Linear, adapter: &Adapter, dropout: f64) -> Result<Lora, AdapterError> {
        let (input, output) = layer.widths();
        let device = layer.weight.device();
        let names = ["A", "B"].map(|f| format!("base_model.model.{}.lora_{f}.weight", layer.name));
        let a = load_tensor(adapter, &names[0], Kind::Float, device)?;
        let b = load_tensor(adapter, &names[1], Kind::Float, device)?;
        let fits = a.size().len() == 2 && b.size() == [output, a.size()[0]] && a.size()[1] == input;
        if !fits {
            let shape = |t: &Tensor| t.size().iter().map(|&d| d as usize).collect();
            return Err(AdapterError::Shape {
                path: adapter.dir().to_owned(),
                module: layer.name.clone(),
                input,
                output,
                a: shape(&a),
                b: shape(&b),
            });
        }
        Ok(Lora::new(a, b, adapter.config().scaling(&layer.name), dropout, &layer.name))
    }

    /// `scaling · dropout(x)·Aᵀ`, `[tokens, r]` in the dtype of `x`: what `Bᵀ` is still to be multiplied with.
    pub fn narrow(&self, x: &Tensor, mode: Mode) -> Tensor {
        let h = mode.dropout(x, self.dropout, self.key).linear::<&Tensor>(&self.a.to_kind(x.kind()), None);
        // Scaling the skinny product costs r per token instead of out per token.
        h * self.scaling
    }

    /// `y + scaling · (dropout(x)·Aᵀ)·Bᵀ`, computed in the dtype of `x`; takes over the memory of `y`.
    pub(crate) fn add_to(&self, mut y: Tensor, x: &Tensor, mode: Mode) -> Tensor {
        y.addmm_(&self.narrow(x, mode), &self.b.to_kind(x.kind()).tr())
    }

    /// Another handle on the same tensors.
    pub fn shallow_clone(&self) -> Lora {
        Lora { a: self.a.shallow_clone(), b: self.b.shallow_clone(), ..*self }
    }

    /// `scaling · B·A` as `[out, in]` f32 without a graph.
    pub fn delta(&self) -> Tensor {
        self.b.detach().matmul(&self.a.detach()) * self.scaling
    }
}

fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Writes the adapters of `layers` (all linear layers of a model, adapted or not) as a PEFT directory in f32, as PEFT does.
///
/// Ranks and scalings are those of the layers: where they differ from `config`, as they may after an adapter was loaded,
/// the difference goes into `rank_pattern` and `alpha_pattern`.
///
/// # Errors
/// [`AdapterError::Checkpoint`] when the directory exists and `overwrite` is false, or cannot be written.
pub fn save_lora<'a>(
    dir: &Path,
    layers: impl Iterator<Item = &'a Linear>,
    config: &LoraConfig,
    base_model: &str,
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), AdapterError> {
    let (adapted, bare): (Vec<&Linear>, Vec<&Linear>) = layers.partition(|l| l.lora.is_some());
    let mut tensors = Vec::new();
    let mut peft = adapter_config(config, base_model);
    peft.target_modules = Some(cl_checkpoint::TargetModules::List(target_names(&adapted, &bare)));
    for layer in adapted {
        let Some(lora) = &layer.lora else { continue };
        let rank = lora.a.size()[0];
        if rank != config.r {
            peft.rank_pattern.push((layer.name.clone(), rank as usize));
        }
        let scaling = |lora_alpha| LoraConfig { r: rank, lora_alpha, ..config.clone() }.scaling();
        if scaling(config.lora_alpha) != lora.scaling {
            let alpha = lora.scaling / scaling(1.0);
            // Most alphas are whole numbers, which the division misses by a bit.
            let alpha = if scaling(alpha.round()) == lora.scaling { alpha.round() } else { alpha };
            peft.alpha_pattern.push((layer.name.clone(), alpha));
        }
        for (factor, tensor) in [("A", &lora.a), ("B", &lora.b)] {
            let spec = TensorSpec {
                name: format!("base_model.model.{}.lora_{factor}.weight", layer.name),
                dtype: Dtype::F32,
                shape: tensor.size().iter().map(|&d| d as usize).collect(),
            };
            tensors.push((spec, tensor_bytes(tensor, Kind::Float)));
        }
    }
    cl_checkpoint::write_adapter(dir, &peft, &tensors, manifest, overwrite)?;
    Ok(())
}

/// The last parts of the adapted layers' names, or whole names where last parts would name bare layers too: PEFT would
/// give those an adapter that the file does not hold.
fn target_names(adapted: &[&Linear], bare: &[&Linear]) -> Vec<String> {
    fn last(layer: &Linear) -> &str {
        layer.name.rsplit('.').next().unwrap_or(&layer.name)
    }
    let exact = adapted.iter().all(|a| bare.iter().all(|b| last(a) != last(b)));
    let mut names: Vec<String> =
        adapted.iter().map(|l| if exact { last(l) } else { &l.name }).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

fn adapter_config(config: &LoraConfig, base_model: &str) -> AdapterConfig {
    AdapterConfig {
        r: config.r as usize,
        lora_alpha: config.lora_alpha,
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        base_model_name_or_path: Some(base_model.to_owned()),
        task_type: Some("CAUSAL_LM".to_owned()),
        inference_mode: true,
        ..AdapterConfig::default()
    }
}

/// Keys of `adapter_config.json` that change what an adapter computes when they hold anything but null, false or nothing.
const CHANGE_THE_MEANING: [&str; 10] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
];

/// Ways of starting the factors that subtract the start from the base weight, which then is no longer the base model's.
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Refuses adapters whose meaning goes beyond `scaling · B·A` beside a linear layer.
///
/// # Errors
/// [`AdapterError::Unsupported`] names the feature.
pub fn check_supported(adapter: &Adapter) -> Result<(), AdapterError> {
    let config = adapter.config();
    let held = |key: &&str| match config.other.get(*key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    };
    let start = config.init_lora_weights.as_str().unwrap_or_default().to_lowercase();
    let feature = if config.peft_type != "LORA" {
        Some(config.peft_type.clone())
    } else if config.use_dora {
        Some("DoRA".to_owned())
    } else if config.bias != "none" {
        Some(format!("bias = \"{}\"", config.bias))
    } else if config.modules_to_save.as_ref().is_some_and(|m| !m.is_empty()) {
        Some("modules_to_save".to_owned())
    } else if config.fan_in_fan_out {
        Some("fan_in_fan_out".to_owned())
    } else if CHANGE_THE_BASE.iter().any(|s| start.starts_with(s)) {
        Some(format!("init_lora_weights = \"{start}\""))
    } else {
        CHANGE_THE_MEANING.iter().find(|k| held(k)).map(|k| (*k).to_owned())
    };
    feature.map_or(Ok(()), |feature| Err(AdapterError::Unsupported { path: adapter.dir().to_owned(), feature }))
}

/// Refuses an adapter that holds other tensors than factors, except copies of the base model's own: PEFT stores the head's
/// weight beside an adapter on the head. `base` gives a weight of the base model by name.
///
/// # Errors
/// [`AdapterError::Unsupported`] names the tensor.
pub fn check_whole_tensors(
    adapter: &Adapter,
    base: &dyn Fn(&str) -> Result<Option<Tensor>, AdapterError>,
) -> Result<(), AdapterError> {
    for name in adapter.names() {
        if name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight") {
            continue;
        }
        let module = name.strip_prefix("base_model.model.").unwrap_or(name).replace(".base_layer.", ".");
        let same = match base(&module)? {
            Some(t) => load_tensor(adapter, name, t.kind(), t.device())? == t,
            None => false,
        };
        if !same {
            let feature = format!("tensor `{name}` is neither a factor nor the base model's own; such");
            return Err(AdapterError::Unsupported { path: adapter.dir().to_owned(), feature });
        }
    }
    Ok(())
}
