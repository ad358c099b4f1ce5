use std::path::{Path, PathBuf};

use anyhow::Result;
use cl_checkpoint::{Adapter, Precision};
use cl_lab::LoadedModel;
use cl_moe::Mixture;
use cl_torch::Quantization;

/// Loads a model with the sum of several adapters. Only the first adapter may contain more than LoRA factors on linear
/// layers (DoRA, adapters on the embedding, fully trained weights).
pub fn open(
    model: &Path,
    adapters: &[PathBuf],
    precision: Precision,
    quantize: Option<&str>,
    device: &str,
) -> Result<LoadedModel> {
    let device = cl_torch::pick_device(device)?;
    let mut adapters: Vec<&PathBuf> = adapters.iter().collect();
    // A mixture is loaded as a whole, and adapters are added to it.
    adapters.sort_by_key(|dir| !Mixture::is_mixture(dir));
    let first = adapters.first().map(|dir| dir.as_path());
    let mut loaded = LoadedModel::open(model, first, precision, quantize.map(quantization).transpose()?, device)?;
    let others = adapters.iter().skip(1).map(|a| Adapter::open(a)).collect::<Result<Vec<_>, _>>()?;
    loaded.model.add_frozen(&others)?;
    Ok(loaded)
}

/// Parses the argument of `--quantize`.
pub fn quantization(name: &str) -> Result<Quantization> {
    Ok(serde_json::from_value(name.into())?)
}
