//! The paper's tool (Lee et al., arXiv:2408.17280): Llama or Mistral with experts in any of their projections.

use super::keys::Keys;
use super::{ExpertLayout, ExpertModule, Experts, Family, ModelConfig, llama, mistral, mixtral};

pub(super) fn read_llama(keys: &Keys) -> Result<ModelConfig, String> {
    Ok(ModelConfig { family: Family::MoeLlama, experts: Some(experts(keys)?), ..llama::read(keys)? })
}

pub(super) fn read_mistral(keys: &Keys) -> Result<ModelConfig, String> {
    Ok(ModelConfig { family: Family::MoeMistral, experts: Some(experts(keys)?), ..mistral::read(keys)? })
}

fn experts(keys: &Keys) -> Result<Experts, String> {
    let others =
        [("deep_router", keys.deep_router), ("gateless", keys.gateless), ("global_router", keys.global_router)];
    if let Some((key, _)) = others.iter().find(|(_, value)| *value == Some(true)) {
        return Err(format!("{key} = true is not supported; expected false"));
    }
    let shared = keys.always_on.unwrap_or(false);
    let storage = keys.expert_storage.unwrap_or_default();
    if shared && storage.is_delta() {
        return Err(format!("always_on = true is not supported with expert_storage = {storage}; expected false"));
    }
    let (num_local_experts, num_experts_per_tok) = mixtral::counts(keys, 4, shared)?;
    let modules = [
        (ExpertModule::Mlp, keys.moe_mlp.unwrap_or(true)),
        (ExpertModule::MlpProjections, keys.moe_mlp_fg.unwrap_or(false)),
        (ExpertModule::Query, keys.moe_query.unwrap_or(false)),
        (ExpertModule::Key, keys.moe_key.unwrap_or(false)),
        (ExpertModule::Value, keys.moe_value.unwrap_or(false)),
        // Ours: the tool leaves o_proj alone.
        (ExpertModule::Output, keys.moe_output.unwrap_or(false)),
    ];
    let modules: Vec<ExpertModule> = modules.into_iter().filter(|(_, on)| *on).map(|(module, _)| module).collect();
    if modules.contains(&ExpertModule::Mlp) && modules.contains(&ExpertModule::MlpProjections) {
        return Err("moe_mlp and moe_mlp_fg are both true; expected one of them".to_owned());
    }
    let count = keys.num_hidden_layers;
    let chosen = keys.moe_layer_idx.as_ref().filter(|layers| !layers.is_empty());
    if let Some(layer) = chosen.and_then(|layers| layers.iter().find(|&&layer| layer >= count)) {
        return Err(format!("moe_layer_idx names layer {layer} of {count}"));
    }
    let layers = (0..count).map(|layer| chosen.is_none_or(|layers| layers.contains(&layer))).collect();
    let layout = ExpertLayout::Moetify;
    Ok(Experts { layout, storage, modules, layers, num_local_experts, shared, num_experts_per_tok })
}
