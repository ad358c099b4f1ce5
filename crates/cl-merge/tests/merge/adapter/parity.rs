//! Parity with PEFT 0.21.2, with files written by `make_adapters.py`.

use std::collections::BTreeMap;

use cl_checkpoint::{Adapter, Checkpoint, Manifest, SafetensorsFile, TensorSource, convert};
use cl_merge::adapter::{CombineOptions, FoldOptions, Space, fold_with};
use cl_merge::{Election, Profile};
use serde_json::Value;

use super::{Deltas, by, combined, deltas, farthest, fixture, fixtures, norm};

fn cases(kind: &str) -> serde_json::Map<String, Value> {
    let text = std::fs::read_to_string(fixture("cases.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    all[kind].as_object().unwrap().clone()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

fn f32s(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    convert::to_f32(file.info(name).unwrap().dtype, file.bytes(name).unwrap()).unwrap()
}

/// Plain adapters, rsLoRA, patterns, DoRA, embeddings, tied and untied heads, and tensors trained in addition to
/// factors. Both sides round sums of a few products near 1 to f32.
#[test]
fn folding_gives_the_weights_that_peft_merges() {
    let cases = cases("fold");
    assert_eq!(cases.len(), 20);
    for (case, about) in cases {
        let base = Checkpoint::open(&fixture(about["base"].as_str().unwrap())).unwrap();
        let names = strings(&about["adapters"]);
        let adapters: Vec<Adapter> = names.iter().map(|name| Adapter::open(&fixture(name)).unwrap()).collect();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let report = fold_with(&base, &adapters, &out, Manifest::new("model"), &FoldOptions::default()).unwrap();
        let ours = Checkpoint::open(&out).unwrap();
        let theirs = SafetensorsFile::open(&fixture(&format!("fold/{case}.safetensors"))).unwrap();
        // PEFT's tensors always include a head.
        let as_one = ["base_as_one", "base_tokens"].contains(&case.as_str());
        let untied = about["base"] == "base" && !as_one;
        assert_eq!((report.untied, ours.config()["tie_word_embeddings"].as_bool()), (untied, Some(as_one)), "{case}");
        let names = theirs.names().into_iter().filter(|name| !as_one || *name != "lm_head.weight");
        assert_eq!(ours.names(), names.collect::<Vec<_>>(), "{case}");
        let rows = ours.info("model.embed_tokens.weight").unwrap().shape[0];
        let expected = if case == "untied_grown" { 12 } else { 10 };
        assert_eq!((rows, ours.config()["vocab_size"].as_u64()), (expected, Some(expected as u64)), "{case}");
        let mut worst = 0.0f32;
        for name in ours.names() {
            let (x, y) = (ours.load_f32(name).unwrap(), f32s(&theirs, name));
            assert_eq!(x.len(), y.len());
            worst = x.iter().zip(&y).fold(worst, |most, (x, y)| most.max((x - y).abs()));
        }
        println!("{case}: {worst:.1e} at most");
        assert!(worst < 5e-7, "{case}: {worst:e}");
    }
}

fn options(about: &Value) -> CombineOptions {
    let kind = about["type"].as_str().unwrap();
    let (method, space) = match kind.strip_suffix("_svd") {
        Some(method) => (method, Space::Delta),
        None if kind == "svd" => ("linear", Space::Delta),
        None => (kind, Space::Factors),
    };
    let mut options = CombineOptions {
        // For adapted tables, PEFT stores the base's in addition to the factors.
        base: Some(fixture("untied")),
        space,
        weights: about["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap()).collect(),
        density: about["density"].as_f64().into_iter().collect(),
        rank: about["svd_rank"].as_u64().map(|rank| rank as usize),
        ..by(method)
    };
    if about["majority_sign_method"] == "frequency" {
        options.parameters.election = Some(Election::Count);
    }
    options
}

/// Returns `ΔW` of the adapter that PEFT created.
fn theirs(case: &str) -> Deltas {
    let file = SafetensorsFile::open(&fixture(&format!("combine/{case}.safetensors"))).unwrap();
    let module = |name: &str| name.strip_suffix(".delta").map(str::to_owned);
    let names: Vec<(String, String)> =
        file.names().into_iter().filter_map(|name| Some((module(name)?, name.to_owned()))).collect();
    names.into_iter().map(|(m, name)| (m, f32s(&file, &name).into_iter().map(f64::from).collect())).collect()
}

/// All methods without random masks, on factors and on truncated updates.
///
/// PEFT sums in f32. Its SVD is of f32 matrices, so a truncation is only accurate to about 1e-6 of the largest singular
/// value.
#[test]
fn combining_gives_what_add_weighted_adapter_gives() {
    let mut compared = 0;
    for (case, about) in cases("combine").iter().filter(|(case, _)| !case.starts_with("dare")) {
        let (_folder, out, report) = combined(&fixtures(&strings(&about["adapters"])), &options(about));
        let worst = farthest(&deltas(&out), &theirs(case));
        println!("{case}: {worst:.1e} at most, relative to the module's norm");
        assert!(worst < 5e-6, "{case}: {worst:e}");
        assert_eq!(report.modules.len(), theirs(case).len(), "{case}");
        compared += 1;
    }
    assert_eq!(compared, 11);
}

/// Random masks differ, so every entry of both results must be possible for some choice of masks. Here, probabilities
/// are rounded to 1/65536, and the rescaling with them, which is 1e-5 for values of about 1.
#[test]
fn dare_on_factors_gives_entries_that_some_mask_gives() {
    for (case, about) in cases("combine").iter().filter(|(case, _)| case.starts_with("dare")) {
        let names = strings(&about["adapters"]);
        let options = options(about);
        let density = options.density[0] as f32;
        let (_folder, out, _) = combined(&fixtures(&names), &options);
        let ours = Adapter::open(&out).unwrap();
        let theirs = SafetensorsFile::open(&fixture(&format!("combine/{case}.safetensors"))).unwrap();
        let inputs: Vec<Adapter> = names.iter().map(|name| Adapter::open(&fixture(name)).unwrap()).collect();
        let mut distinct = BTreeMap::<usize, usize>::new();
        for module in ours.modules() {
            let suffixes = ["lora_A", "lora_B"];
            for ((name, suffix), is_a) in module.factors().iter().zip(suffixes).zip([true, false]) {
                let load = |adapter: &Adapter| {
                    convert::to_f32(adapter.info(name).unwrap().dtype, adapter.bytes(name).unwrap())
                };
                let values: Vec<Vec<f32>> = inputs.iter().map(|adapter| load(adapter).unwrap()).collect();
                let scale = |i: usize| (options.weights[i] * inputs[i].config().scaling(&module.name)) as f32;
                let scales: Vec<f32> =
                    (0..3).map(|i| scale(i).abs().sqrt() * if is_a { scale(i).signum() } else { 1.0 }).collect();
                let got = load(&ours).unwrap();
                let peft = f32s(&theirs, &format!("{}.{suffix}", module.name));
                for n in 0..got.len() {
                    let candidates: Vec<f32> = (0..8)
                        .map(|mask| {
                            let kept = |i: usize| if mask >> i & 1 == 1 { values[i][n] / density } else { 0.0 };
                            let all: Vec<f32> = (0..3).map(kept).collect();
                            let elected = if all.iter().sum::<f32>() >= 0.0 { 1.0f32 } else { -1.0 };
                            let agrees = |x: f32| x != 0.0 && (case == "dare_linear" || x.signum() == elected);
                            let members: Vec<usize> = (0..3).filter(|&i| agrees(all[i])).collect();
                            let sum: f32 = members.iter().map(|&i| scales[i] * all[i]).sum();
                            if case == "dare_linear" { sum } else { sum / members.len().max(1) as f32 }
                        })
                        .collect();
                    let which = |x: f32| candidates.iter().position(|c| (c - x).abs() < 1e-4);
                    assert!(
                        which(peft[n]).is_some(),
                        "{case} {name} {n}: PEFT's {} is none of {candidates:?}",
                        peft[n]
                    );
                    let mask = which(got[n]);
                    assert!(mask.is_some(), "{case} {name} {n}: {} is none of {candidates:?}", got[n]);
                    *distinct.entry(mask.unwrap_or(0)).or_default() += 1;
                }
            }
        }
        assert!(distinct.len() > 4, "{case}: masks are drawn, {distinct:?}");
    }
}

/// The paper's profile reproduces PEFT's original behavior: a density of 0.2, and no rescaling.
#[test]
fn the_paper_s_profile_leaves_the_rescale_out() {
    let dirs = fixtures(&["plain", "other"]);
    for space in [Space::Delta, Space::Factors] {
        let options = |profile, density| CombineOptions { profile, density, space, rank: None, ..by("dare_linear") };
        let deltas = |profile, density| deltas(&combined(&dirs, &options(profile, density)).1);
        let (paper, method) = (deltas(Profile::Paper, vec![]), deltas(Profile::Method, vec![0.2]));
        // In the space of factors, both factors are divided by the density.
        let factor = if space == Space::Delta { 5.0 } else { 25.0 };
        let mut kept = 0;
        for (module, values) in &paper {
            if norm(values) == 0.0 {
                continue;
            }
            kept += 1;
            let ratio = norm(&method[module]) / norm(values);
            // Masks keep an entry with a probability of 13,107 / 65,536.
            assert!((ratio / factor - 1.0).abs() < 1e-3, "{space:?} {module}: {ratio}");
        }
        assert!(kept > 0, "{space:?}");
        assert_eq!(paper, deltas(Profile::Paper, vec![0.2]), "{space:?}");
    }
}
