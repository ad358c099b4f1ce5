//! A custom merge method: the entry-wise median of task vectors.
//!
//! ```sh
//! cargo run -p cl-merge --example custom_merge -- merged
//! ```
//!
//! Merges two tiny models from the test fixtures with this method, using the same engine as the built-in methods.

use std::path::{Path, PathBuf};

use cl_merge::methods::{Defaults, MethodInfo, SettingsError, TensorSettings};
use cl_merge::{Error, MergeFile, MergeMethod, MergeOptions, MergePieces, Piece, Plan, Summary, TensorGroup, merge};
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
fn run(out: &Path) -> Result<Summary, Box<dyn std::error::Error>> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let text = "
        base_model = 'MODELS/base'
        [method.median]
        lambda = 0.5
        [[models]]
        model = 'MODELS/ft0'
        [[models]]
        model = 'MODELS/ft1'
    ";
    let file = MergeFile::from_toml(&text.replace("MODELS", &models.display().to_string()))?;
    let plan = Plan::with_method(&file.stages[0], &MEDIAN)?;
    Ok(merge(&plan, out, &MergeOptions::default(), &|_bytes| ())?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("merged"), PathBuf::from);
    let summary = run(&out)?;
    println!("{}: {} tensors, {} bytes", out.display(), summary.tensors, summary.bytes);
    Ok(())
}

/// For two task vectors, the median is the mean.
#[test]
fn the_median_of_two_models_is_half_of_their_sum() {
    use cl_checkpoint::{Checkpoint, TensorSource};
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("merged");
    assert_eq!(run(&out).unwrap().tensors, 20);
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let open = |dir: &Path| Checkpoint::open(dir).unwrap();
    let [merged, base, a, b] = [out, models.join("base"), models.join("ft0"), models.join("ft1")].map(|d| open(&d));
    for name in merged.names() {
        let [merged, base, a, b] = [&merged, &base, &a, &b].map(|model| model.load_f32(name).unwrap());
        for i in 0..base.len() {
            let expected = base[i] + 0.25 * ((a[i] - base[i]) + (b[i] - base[i]));
            // bf16 has 8 bits of significand precision.
            assert!((merged[i] - expected).abs() <= expected.abs() / 256.0, "{name}[{i}]: {} {expected}", merged[i]);
        }
    }
}
