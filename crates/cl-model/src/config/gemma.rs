use serde_json::{Map, Value};

use super::keys::{DEFAULTS, Defaults, Keys};
use super::rope::scaling;
use super::{Family, ModelConfig, NormPlacement, QkNorm};
use crate::problem::ConfigProblem;

const GEMMA: Defaults = Defaults {
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    rope_theta: 10_000.0,
    tie_word_embeddings: true,
    max_position_embeddings: 8192,
    hidden_act: "gelu_pytorch_tanh",
    ..DEFAULTS
};

/// Gemma 2 (arXiv:2408.00118): every other layer, starting with the first, has a sliding window.
pub(super) fn read_gemma2(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let config = ModelConfig {
        rope_scaling: keys.scaling()?,
        windows: keys.windows(window(keys), |layer| layer % 2 == 0)?,
        attn_logit_softcapping: keys.attn_logit_softcapping.unwrap_or(Some(50.0)),
        final_logit_softcapping: keys.final_logit_softcapping.unwrap_or(Some(30.0)),
        ..keys.config(Family::Gemma2, &GEMMA)?
    };
    Ok(gemma(keys, config))
}

/// Gemma 3, text only (arXiv:2503.19786): five layers with a sliding window for each layer with full attention. The two
/// types of layers have different rotary frequencies.
pub(super) fn read_gemma3(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { rope_theta: 1e6, max_position_embeddings: 131_072, ..GEMMA };
    let every = keys.sliding_window_pattern.unwrap_or(6).max(1);
    // Transformers 5 stores separate rotary parameters for each type of layer.
    let of = |layers: &str| keys.rope_parameters.as_ref().and_then(|p| p.get(layers)).and_then(Value::as_object);
    let (full, windowed) = (of("full_attention"), of("sliding_attention"));
    let theta = |map: Option<&Map<String, Value>>| map.and_then(|m| m.get("rope_theta")).and_then(Value::as_f64);
    let common = keys.config(Family::Gemma3, &defaults)?;
    let config = ModelConfig {
        rope_theta: theta(full).unwrap_or(common.rope_theta),
        rope_scaling: full.map_or_else(|| keys.scaling(), scaling)?,
        rope_local_base_freq: Some(theta(windowed).or(keys.rope_local_base_freq).unwrap_or(10_000.0)),
        windows: keys.windows(window(keys), |layer| (layer + 1) % every != 0)?,
        qk_norm: QkNorm::Head,
        attn_logit_softcapping: keys.attn_logit_softcapping.flatten(),
        final_logit_softcapping: keys.final_logit_softcapping.flatten(),
        ..common
    };
    Ok(gemma(keys, config))
}

fn window(keys: &Keys) -> Option<i64> {
    keys.sliding_window.unwrap_or(Some(4096))
}

/// Settings that Gemma 2 and Gemma 3 share.
fn gemma(keys: &Keys, config: ModelConfig) -> ModelConfig {
    let bias = keys.attention_bias.unwrap_or(false);
    ModelConfig {
        norm_offset: true,
        norms: NormPlacement::PreAndPost,
        qkv_bias: bias,
        o_bias: bias,
        attention_multiplier: Some(keys.query_pre_attn_scalar.unwrap_or(256.0).powf(-0.5)),
        embedding_multiplier: (config.hidden_size as f64).sqrt(),
        ..config
    }
}
