//! A custom merge method: the entry-wise median of task vectors.
//!
//! ```sh
//! cargo run -p cl-merge --example custom_merge -- merged
//! cargo run -p cl-merge --example custom_merge -- merged merge.yaml
//! ```
//!
//! Runs a merge file in TOML or mergekit's YAML, which can name this method or built-in ones in any of its stages, using
//! the same engine as the command `cl-merge`. Without a file, it merges two tiny models from the test fixtures.

use std::path::{Path, PathBuf};

use cl_merge::methods::{Defaults, MethodInfo, SettingsError, TensorSettings};
use cl_merge::{
    Error, Event, MergeFile, MergeMethod, MergeOptions, MergePieces, MethodRegistry, Piece, Summary, TensorGroup,
    run_file_with,
};
use serde::Deserialize;

/// `θ = θ₀ + λ · median(δᵢ)`, entry by entry.
#[derive(Deserialize)]
struct Median {
    lambda: f32,
}

static MEDIAN: MethodInfo = MethodInfo {
    title: "Median",
    formula: "θ₀ + λ · median(δᵢ)",
    parameters: &["lambda"],
    defaults: |_| Defaults::new().with("lambda", 1.0),
    ..MethodInfo::new("median", build)
};

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    Ok(Box::new(settings.read::<Median>()?))
}

impl MergeMethod for Median {
    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, _group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        Ok(Box::new(|piece: &mut Piece, out: &mut [f32]| {
            for (i, out) in out.iter_mut().enumerate() {
                let mut deltas: Vec<f32> = piece.models.iter().map(|model| model[i]).collect();
                deltas.sort_unstable_by(f32::total_cmp);
                let middle = (deltas[(deltas.len() - 1) / 2] + deltas[deltas.len() / 2]) / 2.0;
                *out = piece.base[i] + self.lambda * middle;
            }
        }))
    }
}

/// Merges two models of the test fixtures.
const EXAMPLE: &str = "
    base_model = 'MODELS/base'
    [method.median]
    lambda = 0.5
    [[models]]
    model = 'MODELS/ft0'
    [[models]]
    model = 'MODELS/ft1'
";

/// Writes the folder of the models into the text of a merge file.
fn with_models(text: &str) -> String {
    text.replace("MODELS", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/models"))
}

/// Runs a merge file whose stages can name the built-in methods and [`MEDIAN`].
fn run(file: &MergeFile, out: &Path) -> Result<Summary, Error> {
    let methods = MethodRegistry::builtin().with(&MEDIAN)?;
    run_file_with(file, &methods, out, &MergeOptions::default(), &|event| {
        if let Event::Note(note) = event {
            eprintln!("note: {note}");
        }
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let out = arguments.next().unwrap_or_else(|| "merged".into());
    let file = match arguments.next() {
        Some(path) => MergeFile::read(&path)?,
        None => MergeFile::from_toml(&with_models(EXAMPLE))?,
    };
    let summary = run(&file, &out)?;
    println!("{}: {} tensors, {} bytes", out.display(), summary.tensors, summary.bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use cl_checkpoint::{Checkpoint, TensorSource};

    use super::*;

    /// Runs a file, and compares every entry of the result with `expected`, a function of those of base, ft0 and ft1.
    fn assert_merges(file: &MergeFile, expected: impl Fn(f32, f32, f32) -> f32) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("merged");
        assert_eq!(run(file, &out).unwrap().tensors, 20);
        let [base, a, b] = ["base", "ft0", "ft1"].map(|model| PathBuf::from(with_models(&format!("MODELS/{model}"))));
        let [merged, base, a, b] = [out, base, a, b].map(|dir| Checkpoint::open(&dir).unwrap());
        for name in merged.names() {
            let [merged, base, a, b] = [&merged, &base, &a, &b].map(|model| model.load_f32(name).unwrap());
            for i in 0..base.len() {
                let expected = expected(base[i], a[i], b[i]);
                // bf16 has 8 bits of significand precision; the result of each stage is rounded.
                let tolerance = (expected.abs() + base[i].abs()) / 128.0;
                assert!((merged[i] - expected).abs() <= tolerance, "{name}[{i}]: {} {expected}", merged[i]);
            }
        }
    }

    /// For two task vectors, the median is the mean.
    #[test]
    fn the_median_of_two_models_is_half_of_their_sum() {
        let file = MergeFile::from_toml(&with_models(EXAMPLE)).unwrap();
        assert_merges(&file, |base, a, b| base + 0.25 * ((a - base) + (b - base)));
    }

    #[test]
    fn a_stage_of_mergekits_yaml_can_name_the_method() {
        let text = "
name: both
merge_method: median
base_model: MODELS/base
models: [{model: MODELS/ft0}, {model: MODELS/ft1}]
---
merge_method: linear
models:
  - {model: both, parameters: {weight: 0.5}}
  - {model: MODELS/base, parameters: {weight: 0.5}}
";
        let file = MergeFile::from_yaml(&with_models(text)).unwrap();
        assert_merges(&file, |base, a, b| base + 0.25 * ((a - base) + (b - base)));
    }
}
