//! Adapters: parity with PEFT, properties that hold for any merge, problems, and the commands.

mod beside;
#[cfg(feature = "cli")]
mod command;
mod laws;
mod on_the_fly;
mod parity;
mod problems;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::{
    Adapter, AdapterConfig, Dtype, LayerKind, Manifest, TensorSource, TensorSpec, convert, write_adapter,
};
use cl_merge::Stream;
use cl_merge::adapter::{CombineOptions, CombineReport, combine};

/// Returns a folder written by `make_adapters.py`.
fn fixture(name: &str) -> PathBuf {
    super::fixtures().join("adapters").join(name)
}

fn fixtures(names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| fixture(name)).collect()
}

type Deltas = BTreeMap<String, Vec<f64>>;

/// Returns `ΔW` of every module in f64, computed entry by entry from the definition, in the layout of the weight.
fn deltas(dir: &Path) -> Deltas {
    let adapter = Adapter::open(dir).unwrap();
    let load = |name: &str| convert::to_f32(adapter.info(name).unwrap().dtype, adapter.bytes(name).unwrap()).unwrap();
    let delta = |module: &cl_checkpoint::AdapterModule| {
        let [a, b] = module.factors().map(|name| load(&name));
        let (rank, inner, outer) = (module.rank(), module.a_shape[1], module.b_shape[0]);
        let scaling = adapter.config().scaling(&module.name);
        let entry = |o: usize, i: usize| {
            let terms = (0..rank).map(|k| f64::from(b[o * rank + k]) * f64::from(a[k * inner + i]));
            scaling * terms.sum::<f64>()
        };
        let values: Vec<f64> = match module.kind {
            LayerKind::Linear => (0..outer * inner).map(|n| entry(n / inner, n % inner)).collect(),
            LayerKind::Embedding => (0..inner * outer).map(|n| entry(n % outer, n / outer)).collect(),
        };
        (module.name.clone(), values)
    };
    adapter.modules().into_iter().map(delta).collect()
}

/// Returns `Σ weight · ΔW` for the modules of all adapters.
fn weighted_sum(dirs: &[PathBuf], weights: &[f64]) -> Deltas {
    let mut sum = Deltas::new();
    for (dir, weight) in dirs.iter().zip(weights) {
        for (module, values) in deltas(dir) {
            let all = sum.entry(module).or_insert_with(|| vec![0.0; values.len()]);
            all.iter_mut().zip(values).for_each(|(s, v)| *s += weight * v);
        }
    }
    sum
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    norm(&a.iter().zip(b).map(|(x, y)| x - y).collect::<Vec<f64>>())
}

/// Returns the largest relative distance of a module. Both must have the same modules.
#[track_caller]
fn farthest(got: &Deltas, expected: &Deltas) -> f64 {
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    let relative = |module: &String| distance(&got[module], &expected[module]) / norm(&expected[module]).max(1e-30);
    expected.keys().map(relative).fold(0.0, f64::max)
}

/// Combines adapters into a temporary folder.
fn combined(dirs: &[PathBuf], options: &CombineOptions) -> (tempfile::TempDir, PathBuf, CombineReport) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let report = combine(dirs, &out, options).unwrap_or_else(|e| panic!("{e}"));
    (folder, out, report)
}

/// Returns options for a method, with the trim scope at which adapters of one and of several modules give the same
/// result.
fn by(method: &str) -> CombineOptions {
    let mut options = CombineOptions { method: method.to_owned(), ..CombineOptions::default() };
    if method == "ties" {
        options.parameters.trim = Some(cl_merge::Trimmed::Tensor);
    }
    options
}

/// Returns random values with absolute values up to one.
fn random(n: usize, seed: u64, key: &str) -> Vec<f32> {
    let mut words = vec![0u16; n];
    Stream::new(seed, key, "test adapter").fill(0, &mut words);
    words.iter().map(|&w| f32::from(w) / 32_768.0 - 1.0).collect()
}

/// Writes an adapter with random factors for linear modules `(name, rows, columns)`. `change` can modify a value, given
/// its tensor and flat index.
fn write_with(
    dir: &Path,
    config: &AdapterConfig,
    modules: &[(&str, usize, usize)],
    seed: u64,
    manifest: Manifest,
    change: impl Fn(&str, usize, f32) -> f32,
) {
    let mut tensors = Vec::new();
    for (module, rows, columns) in modules {
        let rank = config.rank(module);
        for (factor, shape) in [("A", [rank, *columns]), ("B", [*rows, rank])] {
            let name = format!("base_model.model.{module}.lora_{factor}.weight");
            let values = random(shape[0] * shape[1], seed, &name);
            let values: Vec<f32> = values.into_iter().enumerate().map(|(i, v)| change(&name, i, v)).collect();
            let bytes = convert::from_f32(Dtype::F32, &values).unwrap();
            tensors.push((TensorSpec { name, dtype: Dtype::F32, shape: shape.to_vec() }, bytes));
        }
    }
    write_adapter(dir, config, &tensors, manifest, true).unwrap();
}

fn write(dir: &Path, config: &AdapterConfig, modules: &[(&str, usize, usize)], seed: u64) {
    write_with(dir, config, modules, seed, Manifest::new("adapter"), |_, _, value| value);
}

fn lora(r: usize, alpha: f64) -> AdapterConfig {
    AdapterConfig { r, lora_alpha: alpha, ..AdapterConfig::default() }
}

/// Writes adapters with different ranks, scalings and targets.
fn mixed(folder: &Path) -> Vec<PathBuf> {
    let dirs: Vec<PathBuf> = ["c", "a", "b"].iter().map(|name| folder.join(name)).collect();
    write(&dirs[0], &lora(3, 6.0), &[("m.0.q", 20, 30), ("m.0.k", 10, 30)], 1);
    write(&dirs[1], &AdapterConfig { use_rslora: true, ..lora(4, 3.0) }, &[("m.0.q", 20, 30), ("m.1.q", 20, 30)], 2);
    let patterns = AdapterConfig {
        rank_pattern: vec![("k".into(), 5)],
        alpha_pattern: vec![("m.0.q".into(), 7.0)],
        ..lora(2, 2.0)
    };
    write(&dirs[2], &patterns, &[("m.0.q", 20, 30), ("m.0.k", 10, 30), ("m.9.v", 90, 80)], 3);
    dirs
}
