//! Reads the keys of a config, with the rules that several families share.

use cl_moe::ExpertStorage;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::rope::scaling;
use super::{Activation, Family, ModelConfig, NormPlacement, QkNorm, RopeScaling, eos_ids};
use crate::problem::{ConfigProblem, RopeProblem};

/// The keys that any family reads. A missing key and `null` are distinguished where they differ in meaning.
#[derive(Deserialize)]
pub(super) struct Keys {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    pub(super) num_hidden_layers: usize,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    rms_norm_eps: Option<f64>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<Map<String, Value>>,
    pub(super) rope_parameters: Option<Map<String, Value>>,
    pub(super) rope_local_base_freq: Option<f64>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) max_position_embeddings: Option<usize>,
    pub(super) original_max_position_embeddings: Option<usize>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) attention_bias: Option<bool>,
    pub(super) attention_out_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    pub(super) sliding_window: Option<Option<i64>>,
    pub(super) sliding_window_pattern: Option<usize>,
    pub(super) use_sliding_window: Option<bool>,
    pub(super) max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    pub(super) no_rope_layers: Option<Vec<i64>>,
    pub(super) no_rope_layer_interval: Option<usize>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    pub(super) query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    pub(super) attn_logit_softcapping: Option<Option<f64>>,
    #[serde(default, deserialize_with = "present")]
    pub(super) final_logit_softcapping: Option<Option<f64>>,
    pub(super) use_bidirectional_attention: Option<bool>,
    pub(super) num_local_experts: Option<i64>,
    pub(super) num_experts_per_tok: Option<i64>,
    pub(super) num_experts: Option<i64>,
    pub(super) norm_topk_prob: Option<bool>,
    pub(super) moe_intermediate_size: Option<i64>,
    pub(super) shared_expert_intermediate_size: Option<i64>,
    pub(super) decoder_sparse_step: Option<usize>,
    pub(super) mlp_only_layers: Option<Vec<usize>>,
    pub(super) qkv_bias: Option<bool>,
    pub(super) moe_mlp: Option<bool>,
    pub(super) moe_mlp_fg: Option<bool>,
    pub(super) moe_query: Option<bool>,
    pub(super) moe_key: Option<bool>,
    pub(super) moe_value: Option<bool>,
    pub(super) moe_output: Option<bool>,
    pub(super) moe_layer_idx: Option<Vec<usize>>,
    pub(super) always_on: Option<bool>,
    pub(super) expert_storage: Option<ExpertStorage>,
    pub(super) deep_router: Option<bool>,
    pub(super) gateless: Option<bool>,
    pub(super) global_router: Option<bool>,
    pub(super) attention_multiplier: Option<f64>,
    pub(super) embedding_multiplier: Option<f64>,
    pub(super) residual_multiplier: Option<f64>,
    pub(super) logits_scaling: Option<f64>,
    eos_token_id: Option<Value>,
}

fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(d).map(Some)
}

/// Defaults of a family.
pub(super) struct Defaults {
    /// Number of key and value heads; `None` for the number of query heads.
    pub(super) num_key_value_heads: Option<i64>,
    /// Dimension of a head; `None` for hidden_size / num_attention_heads.
    pub(super) head_dim: Option<i64>,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) tie_word_embeddings: bool,
    pub(super) max_position_embeddings: usize,
    pub(super) hidden_act: &'static str,
}

/// The defaults of Llama.
pub(super) const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: None,
    head_dim: None,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    tie_word_embeddings: false,
    max_position_embeddings: 2048,
    hidden_act: "silu",
};

impl Keys {
    pub(super) fn read(json: &Map<String, Value>) -> Result<Keys, ConfigProblem> {
        if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
            return Err(ConfigProblem::Quantized);
        }
        let keys: Keys = serde_json::from_value(Value::Object(json.clone()))?;
        if keys.use_bidirectional_attention == Some(true) {
            return Err(ConfigProblem::UnsupportedTrue { key: "use_bidirectional_attention" });
        }
        Ok(keys)
    }

    /// The table of rotary settings: `rope_scaling`, or Transformers 5's `rope_parameters`. Its values take precedence
    /// over the keys of the same names next to it, as in Transformers.
    fn rope_table(&self) -> Option<&Map<String, Value>> {
        self.rope_scaling.as_ref().or(self.rope_parameters.as_ref())
    }

    /// `rope_theta`, from the table of rotary settings or from its own key.
    pub(super) fn theta(&self, default: f64) -> f64 {
        let inside = self.rope_table().and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        inside.or(self.rope_theta).unwrap_or(default)
    }

    /// Fraction of each head that is rotated.
    pub(super) fn partial_rotary(&self) -> Result<f64, RopeProblem> {
        let inside = self.rope_table().and_then(|p| p.get("partial_rotary_factor")).and_then(Value::as_f64);
        match inside.or(self.partial_rotary_factor).unwrap_or(1.0) {
            factor if factor > 0.0 && factor <= 1.0 => Ok(factor),
            factor => Err(RopeProblem::PartialRange { factor }),
        }
    }

    /// `rope_scaling`, or the corresponding part of Transformers 5's `rope_parameters`.
    pub(super) fn scaling(&self) -> Result<RopeScaling, RopeProblem> {
        match self.rope_table() {
            Some(map) => scaling(map),
            None => Ok(RopeScaling::Default),
        }
    }

    /// Creates a config from the keys common to all families; all other settings are those of Llama.
    pub(super) fn config(&self, family: Family, defaults: &Defaults) -> Result<ModelConfig, ConfigProblem> {
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads.or(defaults.num_key_value_heads).unwrap_or(heads);
        self.check_sizes(kv_heads)?;
        let head_dim = match self.head_dim.or(defaults.head_dim) {
            Some(width) => width,
            None if self.hidden_size % heads != 0 => {
                return Err(ConfigProblem::HeadWidth { hidden_size: self.hidden_size, num_attention_heads: heads });
            }
            None => self.hidden_size / heads,
        };
        let rope_theta = self.theta(defaults.rope_theta);
        let partial = self.partial_rotary()?;
        if partial != 1.0 && family != Family::Phi3 {
            return Err(RopeProblem::Partial { factor: partial }.into());
        }
        let rotary_dim = (head_dim as f64 * partial) as i64;
        Ok(ModelConfig {
            family,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rotary_dim,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(defaults.rms_norm_eps),
            norm_offset: false,
            norms: NormPlacement::Pre,
            rope_theta,
            rope_scaling: RopeScaling::Default,
            rope_local_base_freq: None,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(defaults.max_position_embeddings),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(defaults.tie_word_embeddings),
            fused_projections: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: QkNorm::None,
            hidden_act: self.activation(defaults.hidden_act)?,
            experts: None,
            windows: vec![None; self.num_hidden_layers],
            uses_rope: vec![true; self.num_hidden_layers],
            attention_multiplier: None,
            attn_logit_softcapping: None,
            final_logit_softcapping: None,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            eos_token_ids: eos_ids(self.eos_token_id.as_ref()).map_err(|value| ConfigProblem::EosTokenId { value })?,
            repetition_penalty: 1.0,
        })
    }

    fn check_sizes(&self, kv_heads: i64) -> Result<(), ConfigProblem> {
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", kv_heads),
            ("num_hidden_layers", i64::try_from(self.num_hidden_layers).unwrap_or(i64::MAX)),
            ("head_dim", self.head_dim.unwrap_or(1)),
        ] {
            if value < 1 {
                return Err(ConfigProblem::TooSmall { key, value, least: 1 });
            }
            // Without these limits, a typing error could exhaust memory before the shape of any tensor is checked.
            let most = if key == "num_hidden_layers" { 10_000 } else { i64::from(i32::MAX) };
            if value > most {
                return Err(ConfigProblem::TooLarge { key, value, most });
            }
        }
        Ok(())
    }

    fn activation(&self, default: &str) -> Result<Activation, ConfigProblem> {
        // Gemma uses its own key `hidden_activation`; its `hidden_act` is a leftover with another value.
        let (key, name) = match (&self.hidden_activation, &self.hidden_act) {
            (Some(name), _) => ("hidden_activation", name.as_str()),
            (None, Some(name)) if default == "silu" => ("hidden_act", name.as_str()),
            _ => ("hidden_act", default),
        };
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            other => Err(ConfigProblem::Activation { key, name: other.to_owned() }),
        }
    }

    /// The sliding window of each layer, from `layer_types`, or from `windowed` if that key is missing.
    pub(super) fn windows(
        &self,
        window: Option<i64>,
        windowed: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<i64>>, ConfigProblem> {
        let n = self.num_hidden_layers;
        if let Some(value) = window.filter(|&w| w < 1) {
            return Err(ConfigProblem::TooSmall { key: "sliding_window", value, least: 1 });
        }
        let Some(types) = &self.layer_types else {
            return Ok((0..n).map(|i| window.filter(|_| windowed(i))).collect());
        };
        if types.len() != n {
            return Err(ConfigProblem::LayerCount { key: "layer_types", entries: types.len(), layers: n });
        }
        let window = |name: &String| match name.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(window),
            other => Err(ConfigProblem::LayerType { name: other.to_owned() }),
        };
        types.iter().map(window).collect()
    }
}
