//! Adapters of a model as PEFT directories.

use std::path::Path;

use cl_checkpoint::{
    Adapter, AdapterConfig, AdapterModule, Dtype, LayerKind, Manifest, TensorSpec, lora_scaling, target_names,
};
use cl_torch::tch::{Kind, Tensor};
use cl_torch::{load_tensor, tensor_bytes};
use serde_json::Value;

use crate::linear::Frozen;
use crate::{AdapterError, InitLoraWeights, Lora, LoraConfig};

/// A layer as a place for an adapter.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// The layer's name.
    pub name: &'a str,
    /// What it is.
    pub kind: LayerKind,
    /// The adapter, where it has one.
    pub lora: Option<&'a Lora>,
    /// What was taken out of the weight at the adapter's start.
    pub start: Option<&'a Frozen>,
}

/// Writes the adapters of `sites` (all layers of a model, adapted or not) as a PEFT directory in f32, as PEFT does.
///
/// Ranks and scalings are those of the layers: where they differ from `config`, as they may after an adapter was loaded,
/// the difference goes into `rank_pattern` and `alpha_pattern`. An adapter whose start was taken out of the weight is
/// written as the difference from the start, at twice the rank, so that it fits the original base.
///
/// # Errors
/// [`AdapterError::Checkpoint`] when the directory exists and `overwrite` is false, or cannot be written.
pub fn save_lora<'a>(
    dir: &Path,
    sites: impl Iterator<Item = Site<'a>>,
    config: &LoraConfig,
    base_model: &str,
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), AdapterError> {
    let (adapted, bare): (Vec<Site<'a>>, Vec<Site<'a>>) = sites.partition(|s| s.lora.is_some());
    let mut tensors = Vec::new();
    let mut peft = adapter_config(config, base_model, adapted.iter().any(|s| s.start.is_some()));
    let names = |sites: &[Site<'a>]| sites.iter().map(|s| s.name).collect::<Vec<_>>();
    peft.target_modules = Some(cl_checkpoint::TargetModules::List(target_names(&names(&adapted), &names(&bare))));
    peft.use_dora = adapted.iter().any(|s| s.lora.is_some_and(|lora| lora.magnitude.is_some()));
    for site in adapted {
        let Some(lora) = site.lora else { continue };
        let [a, b] = factors(lora, site.start);
        let rank = a.size()[0];
        if rank != peft.r as i64 {
            peft.rank_pattern.push((site.name.to_owned(), rank as usize));
        }
        let scaling = |alpha| lora_scaling(alpha, rank as f64, config.use_rslora);
        if scaling(peft.lora_alpha) != lora.scaling {
            let alpha = lora.scaling / scaling(1.0);
            // Most alphas are whole numbers, which the division misses by a bit.
            let alpha = if scaling(alpha.round()) == lora.scaling { alpha.round() } else { alpha };
            peft.alpha_pattern.push((site.name.to_owned(), alpha));
        }
        let shape = |t: &Tensor| t.size().iter().map(|&d| d as usize).collect::<Vec<usize>>();
        let (a_shape, b_shape) = (shape(&a), shape(&b));
        let module = AdapterModule { name: site.name.to_owned(), kind: site.kind, a_shape, b_shape, dora: false };
        let mut put = |name: String, tensor: &Tensor| {
            let spec = TensorSpec { name, dtype: Dtype::F32, shape: shape(tensor) };
            tensors.push((spec, tensor_bytes(tensor, Kind::Float)));
        };
        for (name, tensor) in module.factors().into_iter().zip([&a, &b]) {
            put(name, tensor);
        }
        if let Some(magnitude) = &lora.magnitude {
            put(format!("base_model.model.{}.lora_magnitude_vector", site.name), &magnitude.vector);
        }
    }
    cl_checkpoint::write_adapter(dir, &peft, &tensors, manifest, overwrite)?;
    Ok(())
}

/// A and B; with a start that was taken out of the weight `[A; A₀]` and `[B, −B₀]`, whose product is the difference.
fn factors(lora: &Lora, start: Option<&Frozen>) -> [Tensor; 2] {
    let (a, b) = (lora.a.detach(), lora.b.detach());
    match start {
        None => [a, b],
        // Its B is negative already.
        Some(start) => [Tensor::cat(&[&a, &start.a], 0), Tensor::cat(&[&b, &start.b], 1)],
    }
}

/// `doubled`: ranks are twice those of the configuration, at the same scaling.
fn adapter_config(config: &LoraConfig, base_model: &str, doubled: bool) -> AdapterConfig {
    let rank = if doubled { 2 * config.r } else { config.r };
    let one = |rank: i64| lora_scaling(1.0, rank as f64, config.use_rslora);
    let init = match config.init_lora_weights {
        init if init.changes_the_base() => InitLoraWeights::Kaiming,
        init => init,
    };
    AdapterConfig {
        r: rank as usize,
        lora_alpha: config.lora_alpha * one(config.r) / one(rank),
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        base_model_name_or_path: Some(base_model.to_owned()),
        task_type: Some("CAUSAL_LM".to_owned()),
        inference_mode: true,
        init_lora_weights: serde_json::to_value(init).unwrap_or(Value::Bool(true)),
        ..AdapterConfig::default()
    }
}

/// Refuses an adapter that holds other tensors than factors, except copies of the base model's own: PEFT stores the head's
/// weight beside an adapter on the head. `base` gives a weight of the base model by name.
///
/// # Errors
/// [`AdapterError::Unsupported`] names the tensor.
pub fn check_whole_tensors(
    adapter: &Adapter,
    base: &dyn Fn(&str) -> Result<Option<Tensor>, AdapterError>,
) -> Result<(), AdapterError> {
    for (name, of_base) in adapter.whole_tensors() {
        let same = match base(&of_base)? {
            Some(t) => load_tensor(adapter, name, t.kind(), t.device())? == t,
            None => false,
        };
        if !same {
            let feature = format!("tensor `{name}` is neither a factor nor the base model's own; such");
            return Err(AdapterError::Unsupported { path: adapter.dir().to_owned(), feature });
        }
    }
    Ok(())
}

/// Refuses an adapter that cannot stay frozen beside a model's layers: DoRA and adapters on embeddings are more than a product
/// beside a linear layer.
///
/// # Errors
/// [`AdapterError::Unsupported`] names the feature.
pub fn check_frozen(adapter: &Adapter) -> Result<(), AdapterError> {
    let modules = adapter.modules();
    let feature = if modules.iter().any(|m| m.kind == LayerKind::Embedding) {
        "frozen embedding"
    } else if modules.iter().any(|m| m.dora) {
        "frozen DoRA"
    } else {
        return Ok(());
    };
    Err(AdapterError::Unsupported { path: adapter.dir().to_owned(), feature: feature.to_owned() })
}
