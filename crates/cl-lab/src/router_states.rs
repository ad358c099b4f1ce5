//! Initial router weights of a mixture of experts, from the hidden states of each expert's prompts in the base model.

use cl_adapters::Mode;
use cl_data::Tokenizer;
use cl_model::{Decoder, PackedBatch};
use cl_moe::{MixConfig, Pooling, router_states_metadata, router_states_spec};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_train::Precision;
use safetensors::tensor::TensorView;

use crate::model_dir::{mixture_error, open_checkpoint};
use crate::problem::ConfigProblem;
use crate::{LabError, LoadedModel};

/// Computes initial router weights, as the bytes of a safetensors file with one f32 tensor `layers.N` of shape
/// `(experts, hidden)` per layer: for each expert, the mean of the layer's input hidden states over its positive
/// prompts, minus the mean over its negative prompts (with [`Pooling::Embeddings`], one direction minus the other). The same for a shared expert with prompts is in tensors
/// `shared_expert.layers.N` of shape `(1, hidden)`.
///
/// # Errors
/// Returns [`LabError::Config`] if an expert has no positive prompt, and an error if the base cannot be loaded or run.
pub fn router_states(config: &MixConfig, precision: Precision, device: Device) -> Result<Vec<u8>, LabError> {
    let (prompts, pooling) = (prompts(config)?, config.router.pooling.unwrap_or_default());
    let loaded = LoadedModel::open(&config.base_model, None, precision, None, device)?;
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let specs = router_states_spec(config, model.config.num_hidden_layers, model.config.hidden_size as usize);
    let mut bytes: Vec<Vec<u8>> = Vec::with_capacity(specs.len());
    for group in prompts.iter().filter(|group| !group.is_empty()) {
        let rows = group.iter().map(|of| states_of(model, tokenizer, *of, pooling));
        let states = Tensor::stack(&rows.collect::<Result<Vec<Tensor>, LabError>>()?, 1); // (layers, rows, hidden)
        bytes.extend(states.unbind(0).iter().map(|layer| cl_torch::tensor_bytes(layer, Kind::Float)));
    }
    let views = specs.iter().zip(&bytes).map(|(spec, bytes)| {
        let view = TensorView::new(spec.dtype, spec.shape.clone(), bytes).expect("size matches the shape");
        (spec.name.clone(), view)
    });
    let base = open_checkpoint(&config.base_model)?;
    let metadata = router_states_metadata(config, &base).map_err(mixture_error(&config.base_model))?;
    Ok(safetensors::serialize(views, Some(metadata)).expect("names and shapes are valid"))
}

/// Prompts of an expert.
#[derive(Clone, Copy)]
pub(crate) struct Prompts<'a> {
    pub(crate) positive: &'a [String],
    pub(crate) negative: &'a [String],
}

/// Returns the prompts of the experts, and those of the shared expert if it has any.
fn prompts(config: &MixConfig) -> Result<[Vec<Prompts<'_>>; 2], LabError> {
    let experts =
        config.experts.iter().map(|e| Prompts { positive: &e.positive_prompts, negative: &e.negative_prompts });
    let shared =
        config.shared_expert.iter().map(|e| Prompts { positive: &e.positive_prompts, negative: &e.negative_prompts });
    let shared = shared.filter(|of| !(of.positive.is_empty() && of.negative.is_empty()));
    let prompts: [Vec<Prompts<'_>>; 2] = [experts.collect(), shared.collect()];
    let missing = |of: &Prompts<'_>| of.positive.is_empty();
    let expert = match (prompts[0].iter().position(missing), prompts[1].iter().any(missing)) {
        (Some(place), _) => format!("experts[{place}]"),
        (None, true) => "shared_expert".to_owned(),
        (None, false) => return Ok(prompts),
    };
    Err(LabError::config(&config.base_model, ConfigProblem::NoPrompts { expert }))
}

/// Computes the input hidden states of each layer, as the mean over positive prompts minus the mean over negative ones.
/// The result has shape `(layers, hidden)` and is f32.
pub(crate) fn states_of(
    model: &Decoder,
    tokenizer: &Tokenizer,
    prompts: Prompts<'_>,
    pooling: Pooling,
) -> Result<Tensor, LabError> {
    let mean = |prompts: &[String]| -> Result<Option<Tensor>, LabError> {
        let ids = prompts.iter().map(|prompt| Ok(tokenizer.encode(prompt, true)?));
        mean_states(model, &ids.collect::<Result<Vec<Vec<u32>>, LabError>>()?, pooling)
    };
    let positive = mean(prompts.positive)?.expect("checked to have one");
    Ok(mean(prompts.negative)?.map_or(positive.shallow_clone(), |negative| positive - negative))
}

/// Computes the mean hidden states over prompts, of shape `(layers, hidden)`, in f32; `None` if there are no prompts. For
/// embeddings it is the direction of the sum over all tokens of all prompts, with norm 1, as in mergekit-moe.
pub(crate) fn mean_states(model: &Decoder, ids: &[Vec<u32>], pooling: Pooling) -> Result<Option<Tensor>, LabError> {
    let states = ids.iter().map(|ids| prompt_states(model, ids, pooling));
    let states = states.collect::<Result<Vec<Tensor>, LabError>>()?;
    if pooling == Pooling::Embeddings && !states.is_empty() {
        let tokens = ids.iter().map(|ids| ids.len() as f64);
        let sum = states.iter().zip(tokens).map(|(mean, tokens)| mean * tokens).reduce(|a, b| a + b);
        let sum = sum.expect("there are states");
        let norm = sum.norm_scalaropt_dim(2.0, [-1i64], true).clamp_min(1e-8);
        return Ok(Some(sum / norm));
    }
    Ok((!states.is_empty()).then(|| Tensor::stack(&states, 0).mean_dim(0, false, Kind::Float)))
}

/// Computes the pooled hidden states of one prompt, of shape `(layers, hidden)`, in f32.
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
