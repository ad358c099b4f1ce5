//! Complete merges: parity with mergekit and with references, properties of every method, plans and their problems,
//! atomic outputs, adapters, layer stacks, output heads, mergekit's YAML, methods of other crates, the command line, and
//! signals.

mod adapter;
mod atomic;
mod command;
mod contract;
mod faults;
mod hub;
mod models;
mod own_methods;
mod parity;
mod plans;
#[cfg(unix)]
mod signals;
mod stacks;
mod tokenizers;
mod yaml;

use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSource, TensorSpec, WriteOptions, convert};
use cl_merge::{MergeConfig, MergeOptions, Plan, merge};

/// Returns the folder of test fixtures.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Runs a merge into a temporary folder and opens the result.
fn run(config: &MergeConfig) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let plan = Plan::new(config).unwrap_or_else(|e| panic!("{e}"));
    merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap_or_else(|e| panic!("{e}"));
    let checkpoint = Checkpoint::open(&out).unwrap();
    (folder, checkpoint)
}

/// Returns all tensors of a checkpoint as f32.
fn values(checkpoint: &Checkpoint) -> Vec<(String, Vec<f32>)> {
    let load = |name: &str| (name.to_owned(), checkpoint.load_f32(name).unwrap());
    checkpoint.names().into_iter().map(load).collect()
}

/// Writes a model of f32 tensors, given by names, shapes and values.
fn write_model(dir: &Path, config: serde_json::Value, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let spec = |(name, shape, _): &(String, Vec<usize>, Vec<f32>)| TensorSpec {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: shape.clone(),
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions::default()).unwrap();
    for (name, _, values) in tensors {
        writer.write(name, &convert::from_f32(Dtype::F32, values).unwrap()).unwrap();
    }
    writer.put_json("config.json", &config).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
}
