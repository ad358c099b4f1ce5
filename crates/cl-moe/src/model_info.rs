use serde::Serialize;

/// Name of the file in an output directory.
pub(crate) const INFO: &str = "model_info.json";

/// Parameter counts of a mixture by purpose, as in `model_info.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModelInfo {
    /// Parameters that every token uses, except routers.
    pub stem_parameters: u64,
    /// Parameters of all experts of all layers.
    pub expert_parameters: u64,
    /// Parameters of all routers.
    pub router_parameters: u64,
    /// Sum of the above.
    pub total_parameters: u64,
    /// Parameters that one token uses: stem, routers, and the selected experts.
    pub active_parameters: u64,
    /// Bytes of tensors; only for mixtures of models.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ModelBytes>,
}

/// Sizes in bytes of a mixture's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModelBytes {
    /// Size of the base in the mixture's dtype.
    pub base_bytes: u64,
    /// Size of all experts.
    pub expert_bytes: u64,
    /// Size of all tensors.
    pub total_bytes: u64,
}

impl ModelInfo {
    /// Computes the sums for `experts` experts, of which each token uses `chosen`.
    pub(crate) fn new(stem: u64, all_experts: u64, routers: u64, experts: usize, chosen: usize) -> ModelInfo {
        ModelInfo {
            stem_parameters: stem,
            expert_parameters: all_experts,
            router_parameters: routers,
            total_parameters: stem + all_experts + routers,
            active_parameters: stem + routers + all_experts / experts.max(1) as u64 * chosen as u64,
            bytes: None,
        }
    }

    /// Computes the sums for adapters on a stem. `experts` has the number of parameters of each; a token uses at most
    /// the `chosen` largest.
    pub(crate) fn of_adapters(stem: u64, experts: &[u64], routers: u64, chosen: usize) -> ModelInfo {
        let mut sorted = experts.to_vec();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let (all, active) = (sorted.iter().sum::<u64>(), sorted.iter().take(chosen).sum::<u64>());
        ModelInfo {
            stem_parameters: stem,
            expert_parameters: all,
            router_parameters: routers,
            total_parameters: stem + all + routers,
            active_parameters: stem + routers + active,
            bytes: None,
        }
    }
}
