//! Hashes of a run's inputs, as lines `hash  path` like those of `b3sum`.

use std::path::{Path, PathBuf};

use cl_checkpoint::{HubSnapshot, hash_file};
use cl_data::Dataset;
use cl_train::TrainConfig;

use crate::{LabError, ModelRef};

/// `base.blake3`: the base model.
pub(crate) fn base_source(model: &ModelRef) -> (&'static str, String) {
    ("base.blake3", line(model.hash(), model.dir()))
}

/// `data.blake3`: the training data, and the adapters that a run continues or stays orthogonal to.
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

/// The inputs that a run directory must not overlap, each with its role.
pub(crate) fn inputs<'a>(
    model: &'a Path,
    train: &'a TrainConfig,
    data: impl Iterator<Item = &'a Path>,
) -> Vec<(&'static str, &'a Path)> {
    let adapters = adapters(train).map(|dir| ("an adapter", dir.as_path()));
    [("the base model", model)].into_iter().chain(adapters).chain(data.map(|d| ("the data", d))).collect()
}

/// The adapters that a run continues or stays orthogonal to.
fn adapters(train: &TrainConfig) -> impl Iterator<Item = &PathBuf> {
    train.initial_adapter.iter().chain(train.olora.iter().flat_map(|o| &o.earlier))
}

/// `mixture.blake3`: the mixture of adapters that a run starts from.
pub(crate) fn mixture_source(hash: &str, dir: &Path) -> (&'static str, String) {
    ("mixture.blake3", line(hash, dir))
}

fn line(hash: &str, path: &Path) -> String {
    format!("{hash}  {}\n", HubSnapshot::source_name(path))
}
