use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ModelError;

/// The architectures that are built, named by Hugging Face's `architectures[0]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`: Llama 1–3, SmolLM, SmolLM2.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: norms on each head of q and k.
    Qwen3,
    /// `SmolLM3ForCausalLM`: every few layers without rotary positions.
    SmolLm3,
}

const SUPPORTED: &str =
    "LlamaForCausalLM (SmolLM, SmolLM2), MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM";

/// How rotary frequencies are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the pretraining.
        original_max_position_embeddings: f64,
    },
}

/// What the decoder needs to know of a `config.json`; fields have its keys' names.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which architecture.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads; a divisor of the query heads.
    pub num_key_value_heads: i64,
    /// Width of one head.
    pub head_dim: i64,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretch.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Norms on each head of q and k.
    pub qk_norm: bool,
    /// Per layer: how many positions a query sees, itself included; `None` for all earlier ones.
    pub windows: Vec<Option<i64>>,
    /// Per layer: whether it uses rotary positions.
    pub uses_rope: Vec<bool>,
    /// Ids that end a generation: those of config.json, and for a model from a directory those of generation_config.json.
    pub eos_token_ids: Vec<u32>,
}

/// The keys as they stand in the file, before family defaults.
#[derive(Deserialize)]
struct Keys {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<i64>>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    no_rope_layers: Option<Vec<i64>>,
    no_rope_layer_interval: Option<usize>,
    hidden_act: Option<String>,
    eos_token_id: Option<Value>,
}

/// Tells an absent key from one that is `null`.
fn present<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Option<i64>>, D::Error> {
    Option::deserialize(d).map(Some)
}

impl ModelConfig {
    /// Reads the config of the model in `dir`.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] or [`ModelError::Config`].
    pub fn from_json(dir: &Path, json: &Map<String, Value>) -> Result<ModelConfig, ModelError> {
        let config = |message: String| ModelError::Config { path: dir.to_owned(), message };
        let family = family(dir, json)?;
        changes_nothing(json).map_err(config)?;
        let keys: Keys = serde_json::from_value(Value::Object(json.clone())).map_err(|e| config(e.to_string()))?;
        if let Some(act) = keys.hidden_act.as_deref().filter(|a| *a != "silu" && *a != "swish") {
            return Err(config(format!("hidden_act `{act}` is not supported; expected `silu`")));
        }
        let n = keys.num_hidden_layers;
        let heads = keys.num_attention_heads;
        let kv_heads = keys.num_key_value_heads.unwrap_or(match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
            Family::SmolLm3 => 4,
        });
        for (key, value) in [
            ("vocab_size", keys.vocab_size),
            ("hidden_size", keys.hidden_size),
            ("intermediate_size", keys.intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("num_hidden_layers", n as i64),
            ("head_dim", keys.head_dim.unwrap_or(1)),
        ] {
            if value < 1 {
                return Err(config(format!("{key} = {value}: expected at least 1")));
            }
            // Beyond these a typing error would ask for all memory before a tensor is looked at.
            let most = if key == "num_hidden_layers" { 10_000 } else { i64::from(i32::MAX) };
            if value > most {
                return Err(config(format!("{key} = {value}: expected at most {most}")));
            }
        }
        if heads % kv_heads != 0 {
            return Err(config(format!(
                "num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}"
            )));
        }
        let head_dim = match (keys.head_dim, family) {
            (Some(d), _) => d,
            (None, Family::Qwen3) => 128,
            (None, _) if keys.hidden_size % heads != 0 => {
                return Err(config(format!(
                    "hidden_size = {} is no multiple of num_attention_heads = {heads} and head_dim is absent",
                    keys.hidden_size
                )));
            }
            (None, _) => keys.hidden_size / heads,
        };
        if head_dim % 2 != 0 {
            return Err(config(format!("head_dim = {head_dim}: rotary positions need an even number")));
        }
        let rms_norm_eps = keys.rms_norm_eps.unwrap_or(1e-6);
        if !rms_norm_eps.is_finite() || rms_norm_eps <= 0.0 {
            return Err(config(format!("rms_norm_eps = {rms_norm_eps}: expected a positive number")));
        }
        let attention_bias = keys.attention_bias.unwrap_or(false);
        let (rope_theta, rope_scaling) = rope(&keys, family).map_err(config)?;
        Ok(ModelConfig {
            family,
            vocab_size: keys.vocab_size,
            hidden_size: keys.hidden_size,
            intermediate_size: keys.intermediate_size,
            num_hidden_layers: n,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            max_position_embeddings: keys.max_position_embeddings.unwrap_or(2048),
            tie_word_embeddings: keys.tie_word_embeddings.unwrap_or(family == Family::SmolLm3),
            qkv_bias: match family {
                Family::Qwen2 => true,
                Family::Mistral => false,
                _ => attention_bias,
            },
            o_bias: matches!(family, Family::Llama | Family::Qwen3 | Family::SmolLm3) && attention_bias,
            mlp_bias: matches!(family, Family::Llama | Family::SmolLm3) && keys.mlp_bias.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            windows: windows(&keys, family).map_err(config)?,
            uses_rope: uses_rope(&keys, family).map_err(config)?,
            eos_token_ids: eos_ids(keys.eos_token_id.as_ref()).map_err(config)?,
        })
    }
}

/// Keys that change what the model computes and are built for one value only.
fn changes_nothing(json: &Map<String, Value>) -> Result<(), String> {
    if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
        return Err(
            "quantization_config: quantized weights are not supported; save the model in f32, f16 or bf16".to_owned()
        );
    }
    let rope = json.get("rope_parameters").and_then(Value::as_object);
    let partial = [Some(json), rope].into_iter().flatten().find_map(|m| m.get("partial_rotary_factor"));
    match partial {
        Some(factor) if !factor.is_null() && factor.as_f64() != Some(1.0) => {
            Err(format!("partial_rotary_factor = {factor} is not supported; expected 1"))
        }
        _ => Ok(()),
    }
}

/// Adds the ids that end a generation by generation_config.json, where Transformers looks for them first.
pub(crate) fn add_generation_eos(config: &mut ModelConfig, dir: &Path) -> Result<(), ModelError> {
    let path = dir.join("generation_config.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(()) };
    let wrong = |message: String| cl_checkpoint::Error::Json { path: path.clone(), message };
    let json: Value = serde_json::from_slice(&text).map_err(|e| wrong(format!("not valid JSON: {e}")))?;
    for id in eos_ids(json.get("eos_token_id")).map_err(wrong)? {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok(())
}

fn family(dir: &Path, json: &Map<String, Value>) -> Result<Family, ModelError> {
    let named = json.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    let model_type = json.get("model_type").and_then(Value::as_str);
    let family = match (named, model_type) {
        (Some("LlamaForCausalLM"), _) | (None, Some("llama")) => Family::Llama,
        (Some("MistralForCausalLM"), _) | (None, Some("mistral")) => Family::Mistral,
        (Some("Qwen2ForCausalLM"), _) | (None, Some("qwen2")) => Family::Qwen2,
        (Some("Qwen3ForCausalLM"), _) | (None, Some("qwen3")) => Family::Qwen3,
        (Some("SmolLM3ForCausalLM"), _) | (None, Some("smollm3")) => Family::SmolLm3,
        (other, kind) => {
            return Err(ModelError::Architecture {
                path: dir.to_owned(),
                architecture: other.or(kind).unwrap_or("(none named)").to_owned(),
                supported: SUPPORTED,
            });
        }
    };
    Ok(family)
}

/// `rope_theta` and `rope_scaling`, from their own keys or from Transformers 5's `rope_parameters`.
fn rope(keys: &Keys, family: Family) -> Result<(f64, RopeScaling), String> {
    let parameters = keys.rope_parameters.as_ref();
    let number = |map: &Map<String, Value>, key: &str| match map.get(key).and_then(Value::as_f64) {
        Some(n) if n.is_finite() && n > 0.0 => Ok(n),
        Some(n) => Err(format!("rope scaling: {key} = {n}: expected a positive number")),
        None => Err(format!("rope scaling needs a number `{key}`")),
    };
    let default_theta = if family == Family::SmolLm3 { 2_000_000.0 } else { 10_000.0 };
    let theta = keys
        .rope_theta
        .or_else(|| parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64))
        .unwrap_or(default_theta);
    if !theta.is_finite() || theta <= 0.0 {
        return Err(format!("rope_theta = {theta}: expected a positive number"));
    }
    let Some(map) = keys.rope_scaling.as_ref().or(parameters) else { return Ok((theta, RopeScaling::Default)) };
    let kind = map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: number(map, "factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: number(map, "factor")?,
            low_freq_factor: number(map, "low_freq_factor")?,
            high_freq_factor: number(map, "high_freq_factor")?,
            original_max_position_embeddings: number(map, "original_max_position_embeddings")?,
        },
        other => {
            return Err(format!("rope scaling `{other}` is not supported; expected default, linear or llama3"));
        }
    };
    Ok((theta, scaling))
}

fn windows(keys: &Keys, family: Family) -> Result<Vec<Option<i64>>, String> {
    let n = keys.num_hidden_layers;
    let window = match (family, keys.sliding_window) {
        (Family::Llama, _) => None,
        (Family::Mistral, None) => Some(4096),
        (Family::Mistral, Some(w)) => w,
        (Family::Qwen2 | Family::Qwen3 | Family::SmolLm3, w) => {
            w.unwrap_or(Some(4096)).filter(|_| keys.use_sliding_window.unwrap_or(false))
        }
    };
    if let Some(w) = window.filter(|&w| w < 1) {
        return Err(format!("sliding_window = {w}: expected at least 1"));
    }
    let Some(types) = keys.layer_types.as_ref().filter(|_| family != Family::Llama) else {
        // Qwen keeps full attention in its first `max_window_layers` layers.
        let first = match family {
            Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 => keys.max_window_layers.unwrap_or(28),
            _ => 0,
        };
        return Ok((0..n).map(|i| window.filter(|_| i >= first)).collect());
    };
    if types.len() != n {
        return Err(format!("layer_types has {} entries for {n} layers", types.len()));
    }
    types
        .iter()
        .map(|t| match t.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(window),
            other => {
                Err(format!("layer type `{other}` is not supported; expected full_attention or sliding_attention"))
            }
        })
        .collect()
}

fn uses_rope(keys: &Keys, family: Family) -> Result<Vec<bool>, String> {
    let n = keys.num_hidden_layers;
    if family != Family::SmolLm3 {
        return Ok(vec![true; n]);
    }
    match &keys.no_rope_layers {
        Some(flags) if flags.len() != n => Err(format!("no_rope_layers has {} entries for {n} layers", flags.len())),
        // The key's name says the opposite: 1 marks the layers that do use rotary positions.
        Some(flags) => Ok(flags.iter().map(|&f| f != 0).collect()),
        None => {
            let interval = keys.no_rope_layer_interval.unwrap_or(4).max(1);
            Ok((0..n).map(|i| (i + 1) % interval != 0).collect())
        }
    }
}

fn eos_ids(value: Option<&Value>) -> Result<Vec<u32>, String> {
    let id = |v: &Value| {
        v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| format!("eos_token_id {v} is not a token id"))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(extra: Value) -> Result<ModelConfig, ModelError> {
        let mut base = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2
        });
        for (k, v) in extra.as_object().unwrap() {
            base[k] = v.clone();
        }
        ModelConfig::from_json(Path::new("m"), base.as_object().unwrap())
    }

    #[test]
    fn windows_follow_the_family() {
        let windows = |extra| read(extra).unwrap().windows;
        assert_eq!(windows(json!({"sliding_window": 8})), [None; 4], "Llama has no window");
        assert_eq!(windows(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 8})), [Some(8); 4]);
        assert_eq!(windows(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null})), [None; 4]);
        assert_eq!(windows(json!({"architectures": ["MistralForCausalLM"]})), [Some(4096); 4]);
        let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": true,
            "max_window_layers": 3});
        assert_eq!(windows(qwen), [None, None, None, Some(8)]);
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let old = read(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        let new = read(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn a_generation_ends_at_the_ids_of_both_files() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = read(json!({"eos_token_id": 2})).unwrap();
        add_generation_eos(&mut config, folder.path()).unwrap();
        assert_eq!(config.eos_token_ids, [2]);
        let file = folder.path().join("generation_config.json");
        std::fs::write(&file, r#"{"eos_token_id": [2, 7]}"#).unwrap();
        add_generation_eos(&mut config, folder.path()).unwrap();
        assert_eq!(config.eos_token_ids, [2, 7]);
        std::fs::write(&file, r#"{"eos_token_id": "x"}"#).unwrap();
        let message = add_generation_eos(&mut config, folder.path()).unwrap_err().to_string();
        assert!(message.contains("generation_config.json") && message.contains("eos_token_id"), "{message}");
    }

    #[test]
    fn errors_name_key_and_value() {
        for (extra, parts) in [
            (json!({"architectures": ["GPT2LMHeadModel"]}), ["GPT2LMHeadModel", "supported: LlamaForCausalLM"]),
            (json!({"num_key_value_heads": 3}), ["num_attention_heads = 4", "num_key_value_heads = 3"]),
            (json!({"hidden_act": "gelu"}), ["gelu", "silu"]),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), ["yarn", "llama3"]),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), ["factor = 0", "positive"]),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), ["low_freq_factor", "number"]),
            (json!({"rope_theta": -1.0}), ["rope_theta = -1", "positive"]),
            (json!({"rms_norm_eps": -1e-5}), ["rms_norm_eps = -0.00001", "positive"]),
            (json!({"head_dim": 7}), ["head_dim = 7", "even"]),
            (json!({"hidden_size": 30}), ["hidden_size = 30", "num_attention_heads = 4"]),
            (
                json!({"num_hidden_layers": 1_000_000_000_000u64}),
                ["num_hidden_layers = 1000000000000", "at most 10000"],
            ),
            (json!({"num_hidden_layers": -1}), ["config.json", "-1"]),
            (
                json!({"architectures": ["MistralForCausalLM"], "sliding_window": 0}),
                ["sliding_window = 0", "at least 1"],
            ),
            (
                json!({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}),
                ["1 entries", "4 layers"],
            ),
            (json!({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}), ["1 entries", "4 layers"]),
            (json!({"hidden_size": "x"}), ["config.json", "invalid type"]),
            (json!({"hidden_size": 0}), ["hidden_size = 0", "at least 1"]),
            (json!({"eos_token_id": -3}), ["eos_token_id", "-3"]),
            (json!({"quantization_config": {"bits": 4}}), ["quantization_config", "bf16"]),
            (json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor = 0.5", "expected 1"]),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
                ["0.25", "expected 1"],
            ),
        ] {
            let message = read(extra).unwrap_err().to_string();
            assert!(parts.iter().all(|p| message.contains(p)), "{message}");
        }
    }
}
