//! Tensors that adapters train in addition to their factors: full modules, biases, token rows.

use std::path::{Path, PathBuf};

use cl_checkpoint::{Adapter, Checkpoint, Manifest, TensorSource, convert};
use cl_merge::adapter::{CombineOptions, FoldOptions, combine, fold_with, info, open};
use cl_merge::{MergeFile, MergeOptions, run_file};

use super::{by, fixture, fixtures};

fn based(method: &str, base: &str) -> CombineOptions {
    CombineOptions { base: Some(fixture(base)), ..by(method) }
}

fn folded(base: &str, dirs: &[PathBuf], weights: &[f64], out: &Path) -> Checkpoint {
    let options = FoldOptions { weights: weights.to_vec(), ..FoldOptions::default() };
    let base = Checkpoint::open(&fixture(base)).unwrap();
    fold_with(&base, &open(dirs).unwrap(), out, Manifest::new("model"), &options).unwrap();
    Checkpoint::open(out).unwrap()
}

/// Returns the largest absolute difference of an entry.
fn apart(a: &Checkpoint, b: &Checkpoint) -> f32 {
    assert_eq!(a.names(), b.names());
    let of = |name: &&str| {
        let (x, y) = (a.load_f32(name).unwrap(), b.load_f32(name).unwrap());
        assert_eq!(x.len(), y.len(), "{name}");
        x.iter().zip(&y).fold(0.0f32, |most, (x, y)| most.max((x - y).abs()))
    };
    a.names().iter().map(of).fold(0.0, f32::max)
}

/// Sums of adapters equal sums of the models' differences, whatever the adapters train in addition to factors.
#[test]
fn to_combine_and_fold_is_to_fold_with_weights() {
    for (base, names, weights) in [
        ("untied", vec!["saved", "tokens", "plain"], vec![0.7, -0.4, 1.0]),
        ("untied", vec!["saved"], vec![1.0]),
        ("biased", vec!["biased_all", "biased_update"], vec![0.5, 2.0]),
        ("biased", vec!["biased_update"], vec![0.5]),
        ("base", vec!["tied_as_one", "tied_tokens"], vec![0.5, 0.25]),
        ("base", vec!["tied_saved", "tied_tokens", "tied_tokens_apart"], vec![0.5, 0.25, 1.0]),
        ("base", vec!["tied_tokens", "tied_tokens_apart"], vec![0.5, 0.25]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dirs = fixtures(&names);
        let direct = folded(base, &dirs, &weights, &folder.path().join("direct"));
        let one = folder.path().join("one");
        combine(&dirs, &one, &CombineOptions { weights: weights.clone(), ..based("linear", base) }).unwrap();
        let combined = folded(base, &[one], &[], &folder.path().join("combined"));
        assert_eq!(direct.config()["tie_word_embeddings"], combined.config()["tie_word_embeddings"], "{names:?}");
        let worst = apart(&direct, &combined);
        assert!(worst < 2e-6, "{names:?}: {worst:e}");
    }
}

/// Embedding and head that are tied in the base and in training stay tied, also in the combined adapter.
#[test]
fn tied_tables_stay_tied_where_adapters_train_them_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    combine(&fixtures(&["tied_as_one", "tied_tokens"]), &out, &based("linear", "base")).unwrap();
    let adapter = Adapter::open(&out).unwrap();
    let both = ["lm_head", "model.embed_tokens"].map(|module| format!("base_model.model.{module}.weight"));
    assert!(adapter.bytes(&both[0]).unwrap() == adapter.bytes(&both[1]).unwrap());
    assert_eq!(adapter.config().other["ensure_weight_tying"], true);
    let model = folded("base", &[out], &[], &folder.path().join("model"));
    assert!(model.info("lm_head.weight").is_none() && model.config()["tie_word_embeddings"] == true);
}

/// A method treats the difference of a fully trained tensor like a model's: merging adapters agrees with merging models
/// up to the rounding of sums.
#[test]
fn methods_treat_whole_tensors_as_merges_of_models_do() {
    for (method, settings) in [
        ("ties", "[method.ties]\ndensity = 0.4\ntrim = \"tensor\"\n"),
        ("dare_ties", "[method.dare_ties]\ndensity = 0.5\n"),
        ("magmax", "[method.magmax]\n"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dirs = fixtures(&["saved", "third"]);
        let one = folder.path().join("one");
        let density = if method == "magmax" { vec![] } else { vec![if method == "ties" { 0.4 } else { 0.5 }] };
        combine(&dirs, &one, &CombineOptions { density, ..based(method, "untied") }).unwrap();
        let ours = folded("untied", &[one], &[], &folder.path().join("ours"));
        let mut text = format!("base_model = {:?}\nseed = 42\n{settings}", fixture("untied"));
        for (dir, name) in dirs.iter().zip(["saved", "third"]) {
            folded("untied", std::slice::from_ref(dir), &[], &folder.path().join(name));
            text += &format!("[[models]]\nmodel = {:?}\nname = {:?}\n", folder.path().join(name), dir);
        }
        let merged = folder.path().join("merged");
        let file = MergeFile::from_toml(&text).unwrap();
        run_file(&file, &merged, &MergeOptions::default(), &|_| ()).unwrap();
        let merged = Checkpoint::open(&merged).unwrap();
        for tensor in ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] {
            let (x, y) = (ours.load_f32(tensor).unwrap(), merged.load_f32(tensor).unwrap());
            let worst = x.iter().zip(&y).fold(0.0f32, |most, (x, y)| most.max((x - y).abs()));
            assert!(worst < 1e-6, "{method} {tensor}: {worst:e}");
        }
    }
}

#[test]
fn a_weight_of_one_keeps_every_trained_bit() {
    let folder = tempfile::tempdir().unwrap();
    let dirs = fixtures(&["saved"]);
    let model = folded("untied", &dirs, &[], &folder.path().join("m"));
    let adapter = Adapter::open(&dirs[0]).unwrap();
    let stored = adapter.bytes("base_model.model.lm_head.weight").unwrap();
    assert!(model.bytes("lm_head.weight").unwrap() == stored);
    let half = folded("untied", &dirs, &[0.5], &folder.path().join("half"));
    let base = Checkpoint::open(&fixture("untied")).unwrap();
    let (b, v) =
        (base.load_f32("lm_head.weight").unwrap(), convert::to_f32(cl_checkpoint::Dtype::F32, stored).unwrap());
    for (h, (b, v)) in half.load_f32("lm_head.weight").unwrap().iter().zip(b.iter().zip(&v)) {
        assert!((h - 0.5 * (b + v)).abs() < 1e-6);
    }
}

#[test]
fn what_has_no_meaning_is_refused_in_a_line() {
    #[track_caller]
    fn says<T>(result: Result<T, cl_merge::Error>, part: &str) {
        let Err(error) = result else { panic!("accepted; expected {part}") };
        assert!(error.to_string().contains(part), "{part} is not in {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let combined = |names: &[&str], options: &CombineOptions| combine(&fixtures(names), &out, options);
    says(
        combined(&["saved", "plain"], &by("linear")),
        "is stored in full, and is combined as its difference from the base's",
    );
    let factors = CombineOptions { space: cl_merge::adapter::Space::Factors, ..based("ties", "untied") };
    says(combined(&["saved", "plain"], &factors), "which PEFT does not combine; use the space `delta`");
    says(combined(&["grown", "saved"], &based("linear", "untied")), "has 12 rows, but the base has 10");
    says(combined(&["saved", "embedding"], &based("linear", "untied")), "has LoRA factors in");
    says(combined(&["biased_update"], &based("linear", "untied")), "which the base");
    let little = CombineOptions { memory: 1 << 20, ..based("linear", "untied") };
    says(combined(&["saved"], &little), "MiB of memory is not enough");
    let fold = |names: &[&str], weights: Vec<f64>| {
        let options = FoldOptions { weights, ..FoldOptions::default() };
        let base = Checkpoint::open(&fixture("untied")).unwrap();
        fold_with(&base, &open(&fixtures(names)).unwrap(), &out, Manifest::new("model"), &options)
    };
    says(fold(&["grown"], vec![0.5]), "fold this adapter alone with a weight of 1");
    says(fold(&["grown", "saved"], vec![]), "fold this adapter alone with a weight of 1");
    assert!(!out.exists());
}

/// Adapters trained one after another do not add up: the values of the second one include those of the first.
#[test]
fn adapters_of_different_bases_are_not_added() {
    let folder = tempfile::tempdir().unwrap();
    let dirs: Vec<PathBuf> = ["a", "b"]
        .iter()
        .map(|name| {
            let dir = folder.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                std::fs::copy(fixture("saved").join(file), dir.join(file)).unwrap();
            }
            let manifest = Manifest::new("adapter").with_source("base", Path::new("base"), format!("hash of {name}"));
            std::fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
            dir
        })
        .collect();
    let base = Checkpoint::open(&fixture("untied")).unwrap();
    let out = folder.path().join("out");
    let error = cl_merge::adapter::fold(&base, &open(&dirs).unwrap(), &out, Manifest::new("model"), false).unwrap_err();
    assert!(error.to_string().contains("fold the adapters one after another"), "{error}");
}

#[test]
fn an_adapter_tells_what_it_holds() {
    let kinds = |name: &str| -> Vec<(String, &'static str, Vec<usize>)> {
        info(&fixture(name)).unwrap().beside.into_iter().map(|b| (b.tensor, b.kind, b.shape)).collect()
    };
    let saved = |tensor: &str, shape: &[usize]| (tensor.to_owned(), "modules_to_save", shape.to_vec());
    assert!(kinds("saved").contains(&saved("model.norm.weight", &[8])));
    assert_eq!(kinds("tokens"), [("model.embed_tokens.weight".to_owned(), "trainable_token_indices", vec![2, 8])]);
    assert!(kinds("biased_update").iter().all(|(_, kind, _)| *kind == "lora_bias"));
    assert!(kinds("head").iter().all(|(_, kind, _)| *kind == "not trained") && kinds("plain").is_empty());
}
