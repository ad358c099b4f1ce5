//! Initial router weights of a mixture of experts: hidden states of each expert's prompts in the base model.

use cl_adapters::Mode;
use cl_data::Tokenizer;
use cl_model::{Decoder, PackedBatch};
use cl_moe::{ExpertConfig, MixConfig, router_states_spec};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_train::Precision;
use safetensors::tensor::TensorView;

use crate::problem::ConfigProblem;
use crate::{LabError, LoadedModel};

/// Reduction of a prompt's hidden states to one vector per layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Hidden state of the last token, like mergekit-moe's `hidden`.
    Last,
    /// Mean over all tokens, like the paper's tool and mergekit-moe's `hidden_avg`.
    Mean,
    /// Mean of the token embeddings, for all layers, like mergekit-moe's `cheap_embed`.
    Embeddings,
}

/// Computes a safetensors file with one f32 tensor `layers.N` of shape `(experts, hidden)` per layer: for each expert,
/// the mean of the layer's input hidden states over its positive prompts, minus the mean over its negative prompts.
///
/// # Errors
/// Returns [`LabError::Config`] if an expert has no positive prompt, and an error if the base cannot be loaded or run.
pub fn router_states(
    config: &MixConfig,
    pooling: Pooling,
    precision: Precision,
    device: Device,
) -> Result<Vec<u8>, LabError> {
    if let Some(expert) = config.experts.iter().position(|e| e.positive_prompts.is_empty()) {
        return Err(LabError::config(&config.base_model, ConfigProblem::NoPrompts { expert }));
    }
    let loaded = LoadedModel::open(&config.base_model, None, precision, None, device)?;
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let rows = config.experts.iter().map(|e| expert_states(model, tokenizer, e, pooling));
    let rows = rows.collect::<Result<Vec<Tensor>, LabError>>()?;
    let states = Tensor::stack(&rows, 1); // (layers, experts, hidden)
    let specs = router_states_spec(model.config.num_hidden_layers, rows.len(), model.config.hidden_size as usize);
    let bytes: Vec<Vec<u8>> =
        (0..specs.len() as i64).map(|layer| cl_torch::tensor_bytes(&states.get(layer), Kind::Float)).collect();
    let views = specs.iter().zip(&bytes).map(|(spec, bytes)| {
        let view = TensorView::new(spec.dtype, spec.shape.clone(), bytes).expect("size matches the shape");
        (spec.name.clone(), view)
    });
    Ok(safetensors::serialize(views, None).expect("names and shapes are valid"))
}

/// `(layers, hidden)`, f32.
fn expert_states(
    model: &Decoder,
    tokenizer: &Tokenizer,
    expert: &ExpertConfig,
    pooling: Pooling,
) -> Result<Tensor, LabError> {
    let mean = |prompts: &[String]| -> Result<Option<Tensor>, LabError> {
        let states = prompts.iter().map(|p| prompt_states(model, &tokenizer.encode(p, true)?, pooling));
        let states = states.collect::<Result<Vec<Tensor>, LabError>>()?;
        Ok((!states.is_empty()).then(|| Tensor::stack(&states, 0).mean_dim(0, false, Kind::Float)))
    };
    let positive = mean(&expert.positive_prompts)?.expect("checked above");
    Ok(mean(&expert.negative_prompts)?.map_or(positive.shallow_clone(), |negative| positive - negative))
}

/// `(layers, hidden)`, f32.
fn prompt_states(model: &Decoder, ids: &[u32], pooling: Pooling) -> Result<Tensor, LabError> {
    let _no_graph = cl_torch::tch::no_grad_guard();
    let batch = PackedBatch::new(&[ids], model.config.vocab_size, model.device)?;
    let layers = model.config.num_hidden_layers;
    let mut states: Vec<Tensor> = Vec::with_capacity(layers);
    let mut keep = |index: usize, x: &Tensor| {
        let x = x.to_kind(Kind::Float);
        match pooling {
            _ if index == layers => {}
            Pooling::Last => states.push(x.get(ids.len() as i64 - 1)),
            Pooling::Embeddings if index > 0 => states.push(states[0].shallow_clone()),
            Pooling::Mean | Pooling::Embeddings => states.push(x.mean_dim(0, false, Kind::Float)),
        }
    };
    let _ = model.forward_observed(&batch, Mode::Eval, &mut keep)?;
    Ok(Tensor::stack(&states, 0))
}
