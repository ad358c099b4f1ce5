//! The format of the paper's tool (Lee et al., arXiv:2408.17280): Llama or Mistral with experts in any of their
//! projections.

use super::keys::Keys;
use super::{ExpertGating, ExpertLayout, ExpertModule, Experts, Family, ModelConfig, llama, mistral, mixtral};
use crate::problem::{ConfigProblem, ExpertsProblem};

pub(super) fn read_llama(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    with_experts(keys, Family::MoeLlama, llama::read(keys)?)
}

pub(super) fn read_mistral(keys: &Keys) -> Result<ModelConfig, ConfigProblem> {
    with_experts(keys, Family::MoeMistral, mistral::read(keys)?)
}

fn with_experts(keys: &Keys, family: Family, dense: ModelConfig) -> Result<ModelConfig, ConfigProblem> {
    let experts = experts(keys, dense.intermediate_size)?;
    Ok(ModelConfig { family, experts: Some(experts), ..dense })
}

fn experts(keys: &Keys, intermediate_size: i64) -> Result<Experts, ConfigProblem> {
    if keys.deep_router == Some(true) {
        return Err(ConfigProblem::UnsupportedTrue { key: "deep_router" });
    }
    let shared = keys.always_on.unwrap_or(false);
    let gating = gating(keys, shared)?;
    let storage = keys.expert_storage.unwrap_or_default();
    if shared && storage.is_delta() {
        return Err(ExpertsProblem::SharedDelta { storage }.into());
    }
    let (num_local_experts, mut num_experts_per_tok) = mixtral::counts(keys, 4, shared)?;
    if gating == ExpertGating::Gateless {
        num_experts_per_tok = num_local_experts;
    }
    let modules = [
        (ExpertModule::Mlp, keys.moe_mlp.unwrap_or(true)),
        (ExpertModule::MlpProjections, keys.moe_mlp_fg.unwrap_or(false)),
        (ExpertModule::Query, keys.moe_query.unwrap_or(false)),
        (ExpertModule::Key, keys.moe_key.unwrap_or(false)),
        (ExpertModule::Value, keys.moe_value.unwrap_or(false)),
        // Our extension: the paper's tool never has experts in o_proj.
        (ExpertModule::Output, keys.moe_output.unwrap_or(false)),
    ];
    let modules: Vec<ExpertModule> = modules.into_iter().filter(|(_, on)| *on).map(|(module, _)| module).collect();
    if modules.contains(&ExpertModule::Mlp) && modules.contains(&ExpertModule::MlpProjections) {
        return Err(ExpertsProblem::TwiceMlp.into());
    }
    let count = keys.num_hidden_layers;
    let chosen = keys.moe_layer_idx.as_ref().filter(|layers| !layers.is_empty());
    if let Some(&layer) = chosen.and_then(|layers| layers.iter().find(|&&layer| layer >= count)) {
        return Err(ExpertsProblem::NoLayer { layer, layers: count }.into());
    }
    let layers = (0..count).map(|layer| chosen.is_none_or(|layers| layers.contains(&layer))).collect();
    let layout = ExpertLayout::Moetify;
    Ok(Experts {
        layout,
        storage,
        modules,
        layers,
        intermediate_size,
        shared_intermediate_size: intermediate_size,
        num_local_experts,
        shared,
        gating,
        num_experts_per_tok,
        norm_topk_prob: true,
    })
}

/// Reads how experts are selected; at most one of `gateless`, `global_router` and `always_on` may be true.
fn gating(keys: &Keys, shared: bool) -> Result<ExpertGating, ExpertsProblem> {
    match (keys.gateless.unwrap_or(false), keys.global_router.unwrap_or(false), shared) {
        (true, false, false) => Ok(ExpertGating::Gateless),
        (false, true, false) => Ok(ExpertGating::Global),
        (false, false, _) => Ok(ExpertGating::Modules),
        _ => Err(ExpertsProblem::Gating),
    }
}
