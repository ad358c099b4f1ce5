//! Hashes of a run's inputs, in lines of the form `hash  path`, as written by `b3sum`.

use std::path::{Path, PathBuf};

use cl_checkpoint::{HubSnapshot, hash_file};
use cl_data::Dataset;
use cl_train::TrainConfig;

use crate::{LabError, ModelRef};

/// Returns `base.blake3`: the hash of the base model.
pub(crate) fn base_source(model: &ModelRef) -> (&'static str, String) {
    ("base.blake3", line(model.hash(), model.dir()))
}

/// Returns `data.blake3`: hashes of the training data, and of adapters that a run continues or stays orthogonal to.
pub(crate) fn data_sources<'d>(
    datasets: impl Iterator<Item = &'d Dataset>,
    train: &TrainConfig,
) -> Result<(&'static str, String), LabError> {
    let mut lines: String = datasets.map(|d| line(&d.hash, &d.path)).collect();
    for dir in adapters(train) {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let path = dir.join(name);
            lines += &line(&hash_file(&path)?.blake3, &path);
        }
    }
    Ok(("data.blake3", lines))
}

/// Returns the inputs that a run directory must not overlap with, each with its role.
pub(crate) fn inputs<'a>(
    model: &'a Path,
    train: &'a TrainConfig,
    data: impl Iterator<Item = &'a Path>,
) -> Vec<(&'static str, &'a Path)> {
    let adapters = adapters(train).map(|dir| ("an adapter", dir.as_path()));
    [("the base model", model)].into_iter().chain(adapters).chain(data.map(|d| ("the data", d))).collect()
}

/// Returns the adapters that a run continues or stays orthogonal to.
fn adapters(train: &TrainConfig) -> impl Iterator<Item = &PathBuf> {
    train.initial_adapter.iter().chain(train.olora.iter().flat_map(|o| &o.earlier))
}

/// Returns `mixture.blake3`: the hash of the mixture of adapters that a run starts from.
pub(crate) fn mixture_source(hash: &str, dir: &Path) -> (&'static str, String) {
    ("mixture.blake3", line(hash, dir))
}

fn line(hash: &str, path: &Path) -> String {
    format!("{hash}  {}\n", HubSnapshot::source_name(path))
}
