//! Problems with adapters, and their messages.

use std::path::{Path, PathBuf};

use cl_checkpoint::{AdapterConfig, Checkpoint, Manifest};
use cl_merge::Parameter;
use cl_merge::adapter::{
    CombineOptions, ExtractOptions, FoldOptions, Space, combine, compare, extract, fold_with, open,
};
use serde_json::Value;

use super::{by, fixture, fixtures, lora, write, write_with};
use crate::models::Llama;

#[track_caller]
fn assert_says<T>(result: Result<T, cl_merge::Error>, parts: &[&str]) {
    let Err(error) = result else { panic!("accepted; expected {parts:?}") };
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[track_caller]
fn refused(dirs: &[PathBuf], options: &CombineOptions, parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    assert_says(combine(dirs, &folder.path().join("out"), options), parts);
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "something was left");
}

fn with(method: &str, change: impl FnOnce(&mut CombineOptions)) -> CombineOptions {
    let mut options = by(method);
    change(&mut options);
    options
}

#[test]
fn options_that_make_no_sense() {
    let dirs = fixtures(&["plain", "other"]);
    refused(
        &dirs,
        &with("linear", |o| o.weights = vec![1.0]),
        &["weights: expected one for each of 2 adapters, got 1"],
    );
    refused(&dirs, &with("linear", |o| o.weights = vec![1.0, f64::NAN]), &["its weight is NaN"]);
    refused(&[], &by("linear"), &["no adapters"]);
    for density in [0.0, -0.5, 1.5, f64::NAN] {
        refused(&dirs, &with("ties", |o| o.density = vec![density]), &["density is", "above 0 and at most 1"]);
    }
    refused(
        &dirs,
        &with("ties", |o| o.density = vec![0.5; 3]),
        &["density: expected one for all or one for each of 2 adapters, got 3"],
    );
    refused(&dirs, &with("linear", |o| o.density = vec![0.5]), &["has no parameter `density`"]);
    refused(&dirs, &by("tie"), &["no method is called `tie`", "dare_ties"]);
    for method in ["slerp", "nearswap", "arcee-fusion", "passthrough", "opcm"] {
        refused(&dirs, &by(method), &["works on the weights of models"]);
    }
    refused(&dirs, &with("linear", |o| o.rank = Some(0)), &["rank is 0"]);
    refused(&dirs, &with("cat", |o| o.rank = Some(4)), &["cat keeps all ranks"]);
    refused(&dirs[..1], &by("model_stock"), &["model_stock takes 2 or more adapters, not 1"]);
    refused(&dirs, &with("sce", |o| o.weights = vec![1.0, 2.0]), &["has no parameter `weight`"]);
    refused(&dirs, &with("della", |o| o.density = vec![0.05]), &["epsilon"]);
    refused(&dirs, &with("ties", |o| o.memory = 1 << 20), &["MiB of memory is not enough", "allow"]);
    // All problems are reported at once.
    let both = with("ties", |o| (o.weights, o.density, o.rank) = (vec![1.0], vec![0.0], Some(0)));
    refused(&dirs, &both, &["weights:", "density is 0", "rank is 0", "3 problems"]);
}

#[test]
fn factors_are_combined_only_as_peft_can() {
    let factors = |method: &str| with(method, |o| o.space = Space::Factors);
    refused(&fixtures(&["plain", "rslora"]), &factors("ties"), &["has rank 2", "has 4", "space delta"]);
    refused(
        &fixtures(&["plain", "other"]),
        &factors("della"),
        &["not one of PEFT's methods on factors", "--space delta"],
    );
    refused(&fixtures(&["plain"]), &factors("tsv"), &["not one of PEFT's methods on factors"]);
    let mut scaled = factors("linear");
    scaled.parameters.lambda = Some(Parameter::Number(0.5));
    refused(&fixtures(&["plain", "other"]), &scaled, &["`lambda` cannot be set in the space `factors`"]);
    let ranked = with("linear", |o| (o.space, o.rank) = (Space::Factors, Some(2)));
    refused(&fixtures(&["plain", "other"]), &ranked, &["remove rank"]);
}

#[test]
fn adapters_that_do_not_belong_together() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    write(&a, &lora(2, 2.0), &[("m.q", 6, 8)], 1);
    write(&b, &lora(2, 2.0), &[("m.q", 6, 9)], 2);
    refused(&[a.clone(), b.clone()], &by("linear"), &["module `m.q`", "[6, 9]", "[6, 8]", "different bases"]);
    assert_says(compare(&a, &b), &["different bases"]);
    let made_for = |hash: &str| Manifest::new("adapter").with_source("base", Path::new("base"), hash.to_owned());
    write_with(&a, &lora(2, 2.0), &[("m.q", 6, 8)], 1, made_for("aaaa"), |_, _, v| v);
    write_with(&b, &lora(2, 2.0), &[("m.q", 6, 8)], 2, made_for("bbbb"), |_, _, v| v);
    refused(&[a.clone(), b.clone()], &by("linear"), &["a different base", "aaaa", "bbbb", "ignore-base"]);
    let out = folder.path().join("out");
    combine(&[a.clone(), b.clone()], &out, &with("linear", |o| o.ignore_base = true)).unwrap();
    let named = |base: &str| AdapterConfig { base_model_name_or_path: Some(base.to_owned()), ..lora(2, 2.0) };
    write(&a, &named("one"), &[("m.q", 6, 8)], 1);
    write(&b, &named("two"), &[("m.q", 6, 8)], 2);
    let report = combine(&[a, b], &out, &with("linear", |o| o.overwrite = true)).unwrap();
    assert_eq!(report.notes, ["adapters name different bases: one, two"]);
}

#[test]
fn modules_that_the_base_does_not_have() {
    let folder = tempfile::tempdir().unwrap();
    let a = folder.path().join("a");
    write(&a, &lora(2, 2.0), &[("model.layers.0.self_attn.q_proj", 8, 8), ("model.layers.7.mlp.up_proj", 12, 8)], 1);
    let based = with("linear", |o| o.base = Some(fixture("untied")));
    refused(std::slice::from_ref(&a), &based, &["module `model.layers.7.mlp.up_proj` is not in the base"]);
    write(&a, &lora(2, 2.0), &[("model.layers.0.self_attn.q_proj", 8, 9)], 1);
    refused(&[a], &based, &["is for a weight of shape [8, 9], but the weight of the base has shape [8, 8]"]);
    refused(&fixtures(&["plain"]), &with("linear", |o| o.base = Some("nowhere".into())), &["nowhere: not found"]);
}

/// Weights stored in addition to the factors must be copies of the base's, which cannot be checked without the base.
#[test]
fn whole_weights_are_taken_as_copies_only() {
    refused(&fixtures(&["head"]), &by("linear"), &["contains the full weight", "specify the base"]);
    let other = with("linear", |o| o.base = Some(fixture("base")));
    refused(&fixtures(&["head"]), &other, &["neither a LoRA factor nor a copy"]);
}

#[test]
fn features_that_are_no_low_rank_update() {
    refused(&fixtures(&["dora"]), &by("linear"), &["DoRA", "fold it into its base"]);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a");
    let layers = [("layer_replication".to_owned(), serde_json::json!([[0, 2]]))].into();
    write(&dir, &AdapterConfig { other: layers, ..lora(2, 2.0) }, &[("m.q", 6, 8)], 1);
    refused(std::slice::from_ref(&dir), &by("linear"), &["layer_replication adapters are not supported"]);
    write(&dir, &lora(2, 2.0), &[("m.q", 6, 8)], 1);
    let path = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["peft_type"] = "IA3".into();
    std::fs::write(&path, config.to_string()).unwrap();
    refused(&[dir], &by("linear"), &["IA3 adapters are not supported"]);
}

#[test]
fn damaged_and_missing_adapters_are_all_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a");
    let change = |name: &str, i: usize, v: f32| if name.contains("lora_B") && i == 5 { f32::NAN } else { v };
    write_with(&dir, &lora(2, 2.0), &[("m.q", 6, 8)], 1, Manifest::new("adapter"), change);
    for method in ["linear", "ties"] {
        refused(std::slice::from_ref(&dir), &by(method), &["m.q.lora_B.weight", "element 5 is NaN"]);
    }
    let missing = [folder.path().join("no"), folder.path().join("nor"), dir];
    refused(&missing, &by("linear"), &["2 problems", "no/adapter_config.json", "nor/adapter_config.json"]);
}

#[test]
fn outputs_that_exist() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let dirs = fixtures(&["plain"]);
    combine(&dirs, &out, &by("linear")).unwrap();
    assert_says(combine(&dirs, &out, &by("linear")), &["already exists"]);
    combine(&dirs, &out, &with("linear", |o| o.overwrite = true)).unwrap();
    let base = Checkpoint::open(&fixture("untied")).unwrap();
    let fold = |overwrite| {
        let options = FoldOptions { overwrite, ..FoldOptions::default() };
        fold_with(&base, &open(&dirs).unwrap(), &out, Manifest::new("model"), &options)
    };
    assert_says(fold(false), &["already exists"]);
    fold(true).unwrap();
    assert_says(extract(&fixture("untied"), &out, &out, &ExtractOptions::default()), &["is the tuned model"]);
}

#[test]
fn folds_that_have_no_meaning() {
    let folder = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&fixture("untied")).unwrap();
    let fold = |base: &Checkpoint, dirs: &[PathBuf], weights: Vec<f64>| {
        let options = FoldOptions { weights, ..FoldOptions::default() };
        fold_with(base, &open(dirs).unwrap(), &folder.path().join("out"), Manifest::new("model"), &options)
    };
    assert_says(fold(&base, &fixtures(&["dora", "plain"]), vec![]), &["a DoRA adapter can only be folded on its own"]);
    assert_says(fold(&base, &fixtures(&["dora"]), vec![0.5]), &["only be folded with a weight of 1, not 0.5"]);
    assert_says(fold(&base, &fixtures(&["plain"]), vec![1.0, 2.0]), &["expected one for each of 1 adapters, got 2"]);
    let tied = Checkpoint::open(&fixture("base")).unwrap();
    assert_says(
        fold(&tied, &fixtures(&["head"]), vec![]),
        &["neither a LoRA factor nor a copy of the base's `lm_head.weight`"],
    );
    let dir = folder.path().join("a");
    write(&dir, &lora(2, 2.0), &[("model.layers.3.mlp.up_proj", 12, 8)], 1);
    assert_says(
        fold(&base, std::slice::from_ref(&dir), vec![]),
        &["module `model.layers.3.mlp.up_proj` is not in the base"],
    );
    let up = [("model.layers.0.mlp.up_proj", 12, 8)];
    let made_for = Manifest::new("adapter").with_source("base", Path::new("base"), "aaaa".to_owned());
    write_with(&dir, &lora(2, 2.0), &up, 1, made_for, |_, _, v| v);
    assert_says(fold(&base, std::slice::from_ref(&dir), vec![]), &["has a different base than", "ignore-base"]);
    cl_merge::adapter::fold(
        &base,
        &open(std::slice::from_ref(&dir)).unwrap(),
        &folder.path().join("m"),
        Manifest::new("model"),
        false,
    )
    .unwrap();
    write_with(&dir, &lora(2, 2.0), &up, 1, Manifest::new("adapter"), |_, _, v| v * 1e30);
    assert_says(fold(&base, &[dir], vec![]), &["cannot be represented", "model.layers.0.mlp.up_proj.weight"]);
    assert!(!folder.path().join("out").exists());
}

#[test]
fn extractions_that_have_no_meaning() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b, out) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("out"));
    let small = Llama { layers: 1, ..Llama::default() };
    small.write(&a, 0);
    Llama { vocab: 44, ..small.clone() }.write(&b, 1);
    let options = ExtractOptions::default();
    assert_says(extract(&a, &b, &out, &options), &["model.embed_tokens.weight", "[40, 16]", "[44, 16]", "vocabulary"]);
    Llama { layers: 2, ..small.clone() }.write(&b, 1);
    assert_says(extract(&a, &b, &out, &options), &["has no tensor `model.layers.1."]);
    small.write(&b, 0);
    assert_says(extract(&a, &b, &out, &options), &["does not differ"]);
    small.write(&b, 1);
    let nothing = || vec!["nothing".to_owned()];
    let wrong = ExtractOptions { rank: 0, targets: nothing(), modules_to_save: nothing(), ..options.clone() };
    let parts =
        ["rank is 0", "target `nothing` matches no linear layer", "modules_to_save: `nothing` matches no module"];
    assert_says(extract(&a, &b, &out, &wrong), &parts);
    let little = ExtractOptions { memory: 1 << 20, ..options };
    assert_says(extract(&a, &b, &out, &little), &["MiB of memory is not enough"]);
    assert!(!out.exists());
}
