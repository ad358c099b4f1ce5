use cl_moe::ExpertStorage;

use super::keys::{DEFAULTS, Defaults, Keys};
use super::mixtral::{check_chosen, check_experts, in_range};
use super::qwen2_moe::layers;
use super::{ExpertGating, ExpertLayout, ExpertModule, Experts, Family, ModelConfig, QkNorm};
use crate::problem::ConfigProblem;

/// Qwen3-MoE (Qwen Team, "Qwen3 Technical Report", arXiv:2505.09388): Qwen3 with experts instead of the MLP, and no shared
/// expert. A sliding window, if there is one, applies to all layers.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(4), max_position_embeddings: 32_768, ..DEFAULTS };
    // Transformers 5 writes `num_local_experts`, earlier versions `num_experts`.
    let (key, num_experts) = match (keys.num_experts, keys.num_local_experts) {
        (None, Some(experts)) => ("num_local_experts", experts),
        (experts, _) => ("num_experts", experts.unwrap_or(128)),
    };
    let num_experts_per_tok = keys.num_experts_per_tok.unwrap_or(8);
    check_experts(key, num_experts)?;
    check_chosen(key, num_experts, false, num_experts_per_tok)?;
    let width = keys.moe_intermediate_size.unwrap_or(768);
    let width = in_range("moe_intermediate_size", width, i64::from(i32::MAX))?;
    let bias = keys.attention_bias.unwrap_or(false);
    let window = keys.sliding_window.unwrap_or(Some(4096)).filter(|_| keys.use_sliding_window.unwrap_or(false));
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::Head,
        windows: keys.windows(window, |_| true)?,
        experts: Some(Experts {
            layout: ExpertLayout::Qwen2Moe,
            storage: ExpertStorage::Full,
            modules: vec![ExpertModule::Mlp],
            layers: layers(keys)?,
            intermediate_size: width,
            shared_intermediate_size: width,
            num_local_experts: num_experts,
            shared: false,
            gating: ExpertGating::Modules,
            num_experts_per_tok,
            norm_topk_prob: keys.norm_topk_prob.unwrap_or(false),
        }),
        ..keys.config(Family::Qwen3Moe, &defaults)?
    })
}
