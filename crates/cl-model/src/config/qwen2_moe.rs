use cl_moe::ExpertStorage;

use super::keys::{DEFAULTS, Defaults, Keys};
use super::mixtral::{check_chosen, check_experts, in_range};
use super::{ExpertGating, ExpertLayout, ExpertModule, Experts, Family, ModelConfig};
use crate::problem::ConfigProblem;

/// Qwen1.5-MoE and Qwen2-MoE (Qwen Team, "Qwen2 Technical Report", arXiv:2407.10671): experts instead of the MLP, and a
/// shared expert for every token, with its own gate.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(16), max_position_embeddings: 32_768, ..DEFAULTS };
    let (num_experts, num_experts_per_tok) = (keys.num_experts.unwrap_or(60), keys.num_experts_per_tok.unwrap_or(4));
    check_experts("num_experts", num_experts)?;
    check_chosen("num_experts", num_experts, false, num_experts_per_tok)?;
    let width = |key, value: Option<i64>, default: i64| in_range(key, value.unwrap_or(default), i64::from(i32::MAX));
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        qkv_bias: keys.qkv_bias.unwrap_or(true),
        windows: windows(keys)?,
        experts: Some(Experts {
            layout: ExpertLayout::Qwen2Moe,
            storage: ExpertStorage::Full,
            modules: vec![ExpertModule::Mlp],
            layers: layers(keys)?,
            intermediate_size: width("moe_intermediate_size", keys.moe_intermediate_size, 1408)?,
            shared_intermediate_size: width(
                "shared_expert_intermediate_size",
                keys.shared_expert_intermediate_size,
                5632,
            )?,
            num_local_experts: num_experts + 1,
            shared: true,
            gating: ExpertGating::Modules,
            num_experts_per_tok,
            norm_topk_prob: keys.norm_topk_prob.unwrap_or(false),
        }),
        ..keys.config(Family::Qwen2Moe, &defaults)?
    })
}

/// Every `decoder_sparse_step`-th layer has experts, except those in `mlp_only_layers`.
pub(super) fn layers(keys: &Keys) -> Result<Vec<bool>, ConfigProblem> {
    let step = keys.decoder_sparse_step.unwrap_or(1);
    if step == 0 {
        return Err(ConfigProblem::TooSmall { key: "decoder_sparse_step", value: 0, least: 1 });
    }
    let dense = keys.mlp_only_layers.as_deref().unwrap_or_default();
    Ok((0..keys.num_hidden_layers).map(|layer| !dense.contains(&layer) && (layer + 1) % step == 0).collect())
}

/// With `use_sliding_window` and without `layer_types`, every other one of the first `max_window_layers` layers has a
/// window, starting with the first.
fn windows(keys: &Keys) -> Result<Vec<Option<i64>>, ConfigProblem> {
    let window = keys.sliding_window.unwrap_or(Some(4096)).filter(|_| keys.use_sliding_window.unwrap_or(false));
    let last = keys.max_window_layers.unwrap_or(28);
    keys.windows(window, |layer| layer % 2 == 0 && layer < last)
}
