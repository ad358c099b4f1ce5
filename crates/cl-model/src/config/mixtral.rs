use super::keys::{DEFAULTS, Defaults, Keys};
use super::{Experts, Family, ModelConfig};

/// Mixtral (Jiang et al., arXiv:2401.04088): Mistral whose MLPs are experts. Without the key there is no window.
pub(super) fn read(keys: &Keys) -> Result<ModelConfig, String> {
    let defaults = Defaults { num_key_value_heads: Some(8), rms_norm_eps: 1e-5, rope_theta: 1e6, ..DEFAULTS };
    let (experts, chosen) = (keys.num_local_experts.unwrap_or(8), keys.num_experts_per_tok.unwrap_or(2));
    if !(1..=4096).contains(&experts) {
        return Err(format!("num_local_experts = {experts}: expected 1 to 4096"));
    }
    if !(1..=experts).contains(&chosen) {
        return Err(format!("num_experts_per_tok = {chosen}: expected 1 to num_local_experts = {experts}"));
    }
    Ok(ModelConfig {
        rope_scaling: keys.scaling()?,
        windows: keys.windows(keys.sliding_window.flatten(), |_| true)?,
        experts: Some(Experts { num_local_experts: experts, num_experts_per_tok: chosen }),
        ..keys.config(Family::Mixtral, &defaults)?
    })
}
