use cl_moe::ExpertStorage;

use super::keys::{DEFAULTS, Defaults, Keys};
use super::{ExpertLayout, ExpertModule, Experts, Family, ModelConfig};

/// Mixtral (Jiang et al., arXiv:2401.04088): Mistral with experts instead of the MLP. No sliding window by default.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, String> {
    let defaults = Defaults { num_key_value_heads: Some(8), rms_norm_eps: 1e-5, rope_theta: 1e6, ..DEFAULTS };
    let (num_local_experts, num_experts_per_tok) = counts(keys, 8, false)?;
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        windows: keys.windows(keys.sliding_window.flatten(), |_| true)?,
        experts: Some(Experts {
            layout: ExpertLayout::Mixtral,
            storage: ExpertStorage::Full,
            modules: vec![ExpertModule::Mlp],
            layers: vec![true; keys.num_hidden_layers],
            num_local_experts,
            shared: false,
            num_experts_per_tok,
        }),
        ..keys.config(Family::Mixtral, &defaults)?
    })
}

/// Validates `num_local_experts` and `num_experts_per_tok`; with `shared`, one of the experts is not selected by the
/// router.
pub(super) fn counts(keys: &Keys, default: i64, shared: bool) -> Result<(i64, i64), String> {
    let (experts, chosen) = (keys.num_local_experts.unwrap_or(default), keys.num_experts_per_tok.unwrap_or(2));
    if !(1..=4096).contains(&experts) {
        return Err(format!("num_local_experts = {experts}: expected 1 to 4096"));
    }
    let routed = experts - i64::from(shared);
    if !(1..=routed).contains(&chosen) {
        let what = if shared { "num_local_experts less the shared one" } else { "num_local_experts" };
        return Err(format!("num_experts_per_tok = {chosen}: expected 1 to {what} = {routed}"));
    }
    Ok((experts, chosen))
}
