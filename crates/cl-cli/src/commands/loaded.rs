use std::path::{Path, PathBuf};

use anyhow::Result;
use cl_checkpoint::Adapter;
use cl_cli::arguments::compute::ComputeArgs;
use cl_lab::LoadedModel;
use cl_moe::Mixture;
use cl_torch::Quantization;

/// Loads a model with the sum of several adapters. Only the first adapter may contain more than LoRA factors on linear
/// layers (DoRA, adapters on the embedding, fully trained weights).
pub fn open(model: &Path, adapters: &[PathBuf], compute: &ComputeArgs) -> Result<LoadedModel> {
    let mut adapters: Vec<&PathBuf> = adapters.iter().collect();
    // A mixture is loaded as a whole, and adapters are added to it.
    adapters.sort_by_key(|dir| !Mixture::is_mixture(dir));
    let first = adapters.first().map(|dir| dir.as_path());
    let mut loaded = open_one(model, first, compute)?;
    let others = adapters.iter().skip(1).map(|a| Adapter::open(a)).collect::<Result<Vec<_>, _>>()?;
    loaded.model.add_frozen(&others)?;
    Ok(loaded)
}

/// Loads a model with at most one adapter.
pub fn open_one(model: &Path, adapter: Option<&Path>, compute: &ComputeArgs) -> Result<LoadedModel> {
    let device = cl_torch::pick_device(&compute.device)?;
    let quantize = compute.quantize.as_deref().map(quantization).transpose()?;
    Ok(LoadedModel::open(model, adapter, compute.precision, quantize, device)?)
}

/// Parses the argument of `--quantize`.
pub fn quantization(name: &str) -> Result<Quantization> {
    Ok(serde_json::from_value(name.into())?)
}
