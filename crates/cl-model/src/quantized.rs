//! Quantized base models: which weights are quantized, and which adapters cannot be trained with them.

use cl_adapters::{AdapterError, Weight, WholePlan, WholeProblem};
use cl_checkpoint::Adapter;
use cl_torch::tch::Tensor;
use cl_torch::{Quantization, Quantized};

use crate::routing::is_router_weight;
use crate::{Decoder, ModelError};

/// Returns whether a tensor of a checkpoint is a weight that is quantized: those of all linear layers except the output
/// head, as in QLoRA and PEFT, and except routers, whose decisions are computed in f32.
pub fn is_quantizable(tensor: &str) -> bool {
    let Some(module) = tensor.strip_suffix(".weight") else { return false };
    let last = module.rsplit('.').next().unwrap_or(module);
    !last.ends_with("norm") && !["embed_tokens", "lm_head"].contains(&last) && !is_router_weight(tensor)
}

/// Checks that an adapter does not fully train a weight that is quantized.
///
/// # Errors
/// Returns [`AdapterError::Parameter`].
pub fn check_trained(plan: &WholePlan) -> Result<(), AdapterError> {
    match plan.saved.iter().find(|name| is_quantizable(name)) {
        None => Ok(()),
        Some(name) => Err(AdapterError::Parameter {
            key: "modules_to_save",
            value: format!("with `{name}`"),
            expected: "embed_tokens, lm_head and norms only, since `base` quantizes the other weights",
        }),
    }
}

/// Checks that an adapter that is trained further does not contain a base weight that is quantized.
///
/// # Errors
/// Returns [`AdapterError::Whole`].
pub fn check_continued(adapter: &Adapter) -> Result<(), AdapterError> {
    match adapter.whole_tensors().into_iter().find(|(_, of_base)| is_quantizable(of_base)) {
        None => Ok(()),
        Some((tensor, _)) => {
            let (path, tensor) = (adapter.dir().to_owned(), tensor.to_owned());
            Err(AdapterError::Whole { path, tensor, problem: WholeProblem::Quantized })
        }
    }
}

/// Converts a loaded weight to its form in memory, which is quantized if `format` applies to it. The dense tensor is
/// then dropped, so that only one dense weight exists at a time while a model is loaded.
pub(crate) fn stored(name: &str, weight: Tensor, format: Option<Quantization>) -> Result<Weight, ModelError> {
    match format.filter(|_| is_quantizable(name) && weight.numel() > 0) {
        None => Ok(Weight::Dense(weight)),
        Some(format) => match Quantized::new(&weight, format) {
            Ok(weight) => Ok(Weight::Quantized(weight)),
            Err(source) => Err(ModelError::Quantization { tensor: name.to_owned(), source }),
        },
    }
}

impl Decoder {
    /// The quantization format of the weights, or `None` if they are not quantized.
    pub fn quantization(&self) -> Option<Quantization> {
        self.linears().find_map(|layer| match &layer.weight {
            Weight::Dense(_) => None,
            Weight::Quantized(weight) => Some(weight.format()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_layers_but_head_and_routers_are_quantized() {
        for (name, expected) in [
            ("model.layers.0.self_attn.q_proj.weight", true),
            ("model.layers.0.self_attn.q_proj.bias", false),
            ("model.layers.0.mlp.gate_proj.weight", true),
            ("model.layers.0.block_sparse_moe.experts.1.w1.weight", true),
            ("model.layers.0.block_sparse_moe.gate.weight", false),
            ("model.layers.0.mlp.gate.weight", false),
            ("model.layers.0.mlp.shared_expert_gate.weight", true),
            ("model.layers.0.self_attn.q_norm.weight", false),
            ("model.layers.0.post_attention_layernorm.weight", false),
            ("model.norm.weight", false),
            ("model.embed_tokens.weight", false),
            ("lm_head.weight", false),
        ] {
            assert_eq!(is_quantizable(name), expected, "{name}");
        }
    }
}
