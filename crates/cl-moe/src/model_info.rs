use serde::Serialize;

/// Name of its file in an output.
pub(crate) const INFO: &str = "model_info.json";

/// Parameters of a mixture by what they are for, as in `model_info.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModelInfo {
    /// Everything that every token goes through, routers aside.
    pub stem_parameters: u64,
    /// All experts of all layers.
    pub expert_parameters: u64,
    /// All routers.
    pub router_parameters: u64,
    /// The sum.
    pub total_parameters: u64,
    /// What one token goes through: stem, routers, and the chosen experts.
    pub active_parameters: u64,
    /// Bytes of tensors; of mixtures of models only.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ModelBytes>,
}

/// Bytes of a mixture's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModelBytes {
    /// Bytes of the base in the mixture's dtype.
    pub base_bytes: u64,
    /// All experts.
    pub expert_bytes: u64,
    /// All tensors.
    pub total_bytes: u64,
}

impl ModelInfo {
    /// Fills in the sums for `experts` experts, of which each token goes through `chosen`.
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

    /// Of adapters beside a stem: `experts` has each one's parameters, and a token goes through the `chosen` largest at most.
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
