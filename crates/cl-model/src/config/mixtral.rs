use cl_moe::ExpertStorage;

use super::keys::{DEFAULTS, Defaults, Keys};
use super::{ExpertGating, ExpertLayout, ExpertModule, Experts, Family, ModelConfig};
use crate::problem::{ConfigProblem, ExpertsProblem};

/// Mixtral (Jiang et al., arXiv:2401.04088): Mistral with experts instead of the MLP. No sliding window by default.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    let defaults = Defaults { num_key_value_heads: Some(8), rms_norm_eps: 1e-5, rope_theta: 1e6, ..DEFAULTS };
    let (num_local_experts, num_experts_per_tok) = counts(keys, 8, false)?;
    let config = keys.config(Family::Mixtral, &defaults)?;
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        windows: keys.windows(keys.sliding_window.flatten(), |_| true)?,
        experts: Some(Experts {
            layout: ExpertLayout::Mixtral,
            storage: ExpertStorage::Full,
            modules: vec![ExpertModule::Mlp],
            layers: vec![true; keys.num_hidden_layers],
            intermediate_size: config.intermediate_size,
            shared_intermediate_size: config.intermediate_size,
            num_local_experts,
            shared: false,
            gating: ExpertGating::Modules,
            num_experts_per_tok,
            norm_topk_prob: true,
        }),
        ..config
    })
}

/// Validates `num_local_experts` and `num_experts_per_tok`. With `shared`, one of the experts is shared, so the router
/// does not select it.
pub(super) fn counts(keys: &Keys, default: i64, shared: bool) -> Result<(i64, i64), ExpertsProblem> {
    let (experts, chosen) = (keys.num_local_experts.unwrap_or(default), keys.num_experts_per_tok.unwrap_or(2));
    check_experts("num_local_experts", experts)?;
    check_chosen("num_local_experts", experts, shared, chosen)?;
    Ok((experts, chosen))
}

pub(super) fn check_experts(key: &'static str, experts: i64) -> Result<(), ExpertsProblem> {
    in_range(key, experts, 4096).map(drop)
}

/// Checks that a number is from 1 to `most`.
pub(super) fn in_range(key: &'static str, value: i64, most: i64) -> Result<i64, ExpertsProblem> {
    if (1..=most).contains(&value) { Ok(value) } else { Err(ExpertsProblem::OutOfRange { key, value, most }) }
}

/// Checks that the number of experts per token is from 1 to the number of experts to select from, which is that of
/// `key` without a shared one.
pub(super) fn check_chosen(key: &'static str, experts: i64, shared: bool, chosen: i64) -> Result<(), ExpertsProblem> {
    let routed = experts - i64::from(shared);
    if (1..=routed).contains(&chosen) { Ok(()) } else { Err(ExpertsProblem::Chosen { chosen, key, shared, routed }) }
}
