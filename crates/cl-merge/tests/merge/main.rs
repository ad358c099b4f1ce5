//! Whole merges: parity with mergekit and with references, the contract that every method obeys, plans and their problems,
//! atomic outputs, adapters, the command, and signals.

mod adapter;
mod atomic;
mod command;
mod contract;
mod faults;
mod hub;
mod models;
mod parity;
mod plans;
#[cfg(unix)]
mod signals;
mod tokenizers;

use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, TensorSource};
use cl_merge::{MergeConfig, MergeOptions, Plan, merge};

/// The folder of fixtures.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Runs a merge into a folder of its own and opens the result.
fn run(config: &MergeConfig) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let plan = Plan::new(config).unwrap_or_else(|e| panic!("{e}"));
    merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap_or_else(|e| panic!("{e}"));
    let checkpoint = Checkpoint::open(&out).unwrap();
    (folder, checkpoint)
}

/// All tensors of a checkpoint as f32.
fn values(checkpoint: &Checkpoint) -> Vec<(String, Vec<f32>)> {
    let load = |name: &str| (name.to_owned(), checkpoint.load_f32(name).unwrap());
    checkpoint.names().into_iter().map(load).collect()
}
