//! Routes a task to adapters: compares hidden states of a few of its prompts with those of each adapter's prompts.

use cl_moe::{BlendConfig, Pooling};
use cl_torch::tch::{Kind, Tensor};

use crate::problem::ConfigProblem;
use crate::router_states::{Prompts, mean_states, states_of};
use crate::{LabError, LoadedModel};

/// Similarity between a task and an adapter, and the resulting weight.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterShare {
    /// Name of the adapter.
    pub name: String,
    /// Cosine similarity between the hidden states of the task's prompts and those of the adapter's prompts, both
    /// relative to the mean over all adapters; averaged over all layers, in `[-1, 1]`.
    pub similarity: f64,
    /// Weight of the adapter for the task: the softmax of similarity / temperature over the selected adapters, and 0
    /// for all others.
    pub gate: f64,
}

/// Compares the prompts of a task, given as tokens, with the adapters of `config`, each of which is described by its
/// `positive_prompts`. `base` is the base model of these adapters. A prompt is represented by the mean of its tokens'
/// hidden states in the base model, and an adapter or a task by the mean of its prompts, for each layer. The weights of
/// the `chosen` closest adapters sum to 1.
///
/// Hidden states are taken relative to the mean over all adapters, because their common part would make all cosine
/// similarities nearly 1.
///
/// # Errors
/// Returns [`LabError::Config`] if there are fewer than two adapters, or if an adapter or the task has no prompts, and
/// an error if the model cannot be run.
pub fn route_task(
    base: &LoadedModel,
    config: &BlendConfig,
    task: &[Vec<u32>],
    chosen: usize,
    temperature: f64,
) -> Result<Vec<AdapterShare>, LabError> {
    let wrong = |problem| LabError::config(&config.base_model, problem);
    if config.experts.len() < 2 {
        return Err(wrong(ConfigProblem::OneAdapter));
    }
    if let Some(place) = config.experts.iter().position(|expert| expert.positive_prompts.is_empty()) {
        return Err(wrong(ConfigProblem::NoPrompts { expert: format!("experts[{place}]") }));
    }
    let none = || wrong(ConfigProblem::NoPrompts { expert: "the task".to_owned() });
    let task = mean_states(&base.model, task, Pooling::Mean)?.ok_or_else(none)?;
    let experts = config.experts.iter().map(|expert| {
        let prompts = Prompts { positive: &expert.positive_prompts, negative: &[] };
        states_of(&base.model, &base.tokenizer, prompts, Pooling::Mean)
    });
    let experts = Tensor::stack(&experts.collect::<Result<Vec<Tensor>, LabError>>()?, 0); // (adapters, layers, hidden)
    let center = experts.mean_dim(0, true, Kind::Double);
    let (experts, task) = (experts.to_kind(Kind::Double) - &center, task.to_kind(Kind::Double) - center);
    let cosines = Tensor::cosine_similarity(&experts, &task, 2, 1e-12).mean_dim(1, false, Kind::Double);
    let similarities = Vec::<f64>::try_from(&cosines).map_err(|e| cl_torch::TorchError::from_tch("route", e))?;
    let gates = gates(&similarities, chosen, temperature);
    let names = config.experts.iter().map(|expert| expert.name());
    let shares = names.zip(similarities).zip(gates);
    Ok(shares.map(|((name, similarity), gate)| AdapterShare { name, similarity, gate }).collect())
}

/// Returns the softmax over the `chosen` largest similarities, and 0 elsewhere; the first of equal values is preferred.
fn gates(similarities: &[f64], chosen: usize, temperature: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..similarities.len()).collect();
    order.sort_by(|&a, &b| similarities[b].total_cmp(&similarities[a]));
    order.truncate(chosen);
    let largest = order.first().map_or(0.0, |&first| similarities[first]);
    let mut gates = vec![0.0; similarities.len()];
    order.iter().for_each(|&i| gates[i] = ((similarities[i] - largest) / temperature).exp());
    let sum: f64 = gates.iter().sum();
    gates.iter_mut().for_each(|gate| *gate /= sum);
    gates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_share_the_weight() {
        let shares = gates(&[0.1, 0.3, -0.2, 0.3], 2, 0.1);
        assert_eq!(shares, [0.0, 0.5, 0.0, 0.5]);
        let shares = gates(&[0.1, 0.3], 5, 0.1);
        assert!((shares[1] / shares[0] - 2f64.exp()).abs() < 1e-9 && (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
