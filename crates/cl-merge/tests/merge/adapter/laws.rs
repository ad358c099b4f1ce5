//! Properties that hold for merges of adapters with any method.

use std::path::{Path, PathBuf};

use cl_checkpoint::{Adapter, Checkpoint, Dtype, LayerKind, Manifest, TensorSource};
use cl_merge::adapter::{
    CombineOptions, ExtractOptions, FoldOptions, Space, combine, compare, extract, fold_with, info, overlap,
};
use cl_merge::{Profile, Trimmed};

use super::{by, combined, deltas, distance, farthest, fixture, fixtures, lora, mixed, norm, weighted_sum, write};
use crate::models::Llama;

/// Methods that return a single update unchanged. iso_c and iso_cts flatten the spectrum, consensus needs two tasks
/// that agree, and model_stock and nuslerp need two models.
const IDENTITIES: [&str; 16] = [
    "cat",
    "linear",
    "task_arithmetic",
    "magnitude_prune",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "magmax",
    "tsv",
    "knots",
    "karcher",
];

#[test]
fn one_adapter_with_weight_one_stays_what_it_is() {
    for name in ["plain", "rslora", "patterns", "embedding", "head"] {
        let expected = deltas(&fixture(name));
        for method in IDENTITIES {
            let base = Some(fixture("untied"));
            let (_folder, out, report) = combined(&[fixture(name)], &CombineOptions { base, ..by(method) });
            let worst = farthest(&deltas(&out), &expected);
            // Updates and factors are in f32; a truncation uses the squares of both, in f64.
            assert!(worst < 2e-6, "{name} {method}: {worst:e}");
            assert!(
                report.total.relative_error < 2e-6 && report.total.energy > 0.999_999,
                "{name} {method} {report:?}"
            );
        }
        for method in ["linear", "cat", "ties", "magnitude_prune", "dare_linear", "dare_ties"] {
            let base = Some(fixture("untied"));
            let options = CombineOptions { space: Space::Factors, base, ..by(method) };
            assert!(farthest(&deltas(&combined(&[fixture(name)], &options).1), &expected) < 1e-6, "{name} {method}");
        }
    }
}

#[test]
fn cat_and_linear_are_exact_for_any_mix() {
    let folder = tempfile::tempdir().unwrap();
    let dirs = mixed(folder.path());
    let weights = [0.5, -1.0, 2.0];
    let expected = weighted_sum(&dirs, &weights);
    for (method, rank) in
        [("cat", None), ("linear", None), ("task_arithmetic", None), ("linear", Some(12)), ("linear", Some(99))]
    {
        let options = CombineOptions { weights: weights.to_vec(), rank, ..by(method) };
        let (_folder, out, report) = combined(&dirs, &options);
        // Factors are rounded to f32 once.
        assert!(farthest(&deltas(&out), &expected) < 2e-7, "{method} {rank:?}");
        assert!(report.total.relative_error < 2e-7, "{method} {rank:?} {:e}", report.total.relative_error);
        let adapter = Adapter::open(&out).unwrap();
        let ranks: Vec<usize> = adapter.modules().iter().map(|m| m.rank()).collect();
        // The sums of ranks are 3 + 5, 3 + 4 + 2, 4 and 2, in the order of names.
        assert_eq!(ranks, [8, 9, 4, 2], "{method}");
        assert!(adapter.modules().iter().all(|m| adapter.config().scaling(&m.name) == 1.0));
    }
}

/// The truncation error agrees with the singular values, and is reported correctly.
#[test]
fn a_rank_loses_what_it_has_to_and_the_report_says_how_much() {
    let folder = tempfile::tempdir().unwrap();
    let dirs = mixed(folder.path());
    let expected = weighted_sum(&dirs, &[1.0; 3]);
    for rank in [1, 3, 6] {
        let (_folder, out, report) = combined(&dirs, &CombineOptions { rank: Some(rank), ..by("linear") });
        let got = deltas(&out);
        for module in &report.modules {
            let shape = [expected[&module.module].len() / columns(&out, &module.module), columns(&out, &module.module)];
            let dense = faer::Mat::from_fn(shape[0], shape[1], |i, j| expected[&module.module][i * shape[1] + j]);
            let values = dense.singular_values().unwrap();
            let tail = values.iter().skip(rank).map(|s| s * s).sum::<f64>().sqrt();
            let norm = norm(&expected[&module.module]);
            let error = distance(&got[&module.module], &expected[&module.module]);
            assert!((error - tail).abs() < 1e-6 * norm, "{} {rank}: {error} {tail}", module.module);
            assert!((module.relative_error - error / norm).abs() < 1e-6, "{} {rank}", module.module);
            assert!((module.energy - (1.0 - (tail / norm).powi(2))).abs() < 1e-6);
            assert!((module.norm - norm).abs() < 1e-6 * norm);
        }
    }
}

fn columns(dir: &Path, module: &str) -> usize {
    let adapter = Adapter::open(dir).unwrap();
    adapter.modules().into_iter().find(|m| m.name == module).map_or(0, |m| m.a_shape[1])
}

fn files(dir: &Path) -> [Vec<u8>; 3] {
    ["adapter_model.safetensors", "adapter_config.json", "manifest.json"]
        .map(|name| std::fs::read(dir.join(name)).unwrap())
}

/// Returns all methods, including those not in [`IDENTITIES`].
fn all() -> impl Iterator<Item = &'static str> {
    IDENTITIES.into_iter().chain(["iso_c", "iso_cts", "consensus", "multislerp", "model_stock", "ram", "ramplus_tl"])
}

/// Results do not depend on the memory limit: with little memory, entries are computed on each read.
#[test]
fn neither_order_nor_threads_nor_memory_change_a_byte() {
    let folder = tempfile::tempdir().unwrap();
    let dirs = mixed(folder.path());
    let backwards: Vec<PathBuf> = dirs.iter().rev().cloned().collect();
    for method in all() {
        let of = |dirs: &[PathBuf], weights: &[f64], threads: usize, memory: usize| {
            let mut options = CombineOptions { threads, memory, rank: (method != "cat").then_some(5), ..by(method) };
            let unweighted = ["sce", "magmax", "tsv", "karcher", "iso_c", "iso_cts", "consensus", "model_stock"];
            if !unweighted.contains(&method) && !method.starts_with("ram") {
                options.weights = weights.to_vec();
            }
            if ["ties", "dare_linear", "dare_ties", "della", "breadcrumbs"].contains(&method) {
                options.density = vec![0.5];
            }
            files(&combined(dirs, &options).1)
        };
        let first = of(&dirs, &[1.0, 0.5, 2.0], 1, 1 << 30);
        assert!(first == of(&dirs, &[1.0, 0.5, 2.0], 3, 1 << 30), "{method}: threads");
        assert!(first == of(&backwards, &[2.0, 0.5, 1.0], 2, 1 << 30), "{method}: order");
        assert!(first == of(&dirs, &[1.0, 0.5, 2.0], 1000, 40 << 20), "{method}: memory");
    }
}

/// Masks are those of a merge of models: they depend only on seed, tensor and adapter.
#[test]
fn another_seed_draws_other_masks() {
    let folder = tempfile::tempdir().unwrap();
    let dirs = mixed(folder.path());
    let of =
        |seed| files(&combined(&dirs, &CombineOptions { seed, density: vec![0.5], ..by("dare_ties") }).1)[0].clone();
    assert!(of(1) == of(1) && of(1) != of(2));
}

/// Without names, masks depend on the directories as given, so the same adapters in other directories give other bytes.
#[test]
fn with_names_it_does_not_matter_where_adapters_are() {
    // Merging factors separately requires equal ranks.
    for (space, other) in [(Space::Delta, "rslora"), (Space::Factors, "plain")] {
        names_decide(space, other);
    }
}

fn names_decide(space: Space, other: &str) {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let place = |root: &Path, parts: [&str; 2]| {
        // The order of the directories differs from that of the names.
        parts.map(|part| {
            let dir = root.join(part);
            let source = fixture(if part.contains('p') { "plain" } else { other });
            std::fs::create_dir(&dir).unwrap();
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                std::fs::copy(source.join(file), dir.join(file)).unwrap();
            }
            dir
        })
    };
    let (a, b) = (place(here.path(), ["1p", "2r"]), place(there.path(), ["9p", "0r"]));
    for method in ["dare_ties", "linear"] {
        let density = if method == "linear" { Vec::new() } else { vec![0.5] };
        let of = |dirs: &[PathBuf], names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let options = CombineOptions { names, density: density.clone(), space, ..by(method) };
            files(&combined(dirs, &options).1)[0].clone()
        };
        let named = of(&a, &["x", "y"]);
        assert!(named == of(&b, &["x", "y"]), "{method} {space:?}: place");
        let turned = [b[1].clone(), b[0].clone()];
        assert!(named == of(&turned, &["y", "x"]), "{method} {space:?}: order");
        if method == "dare_ties" {
            assert!(named != of(&a, &["x", "z"]), "{space:?}: names key the masks");
        }
    }
    let options = CombineOptions { names: vec!["x".to_owned()], ..by("linear") };
    let message = combine(&a, &here.path().join("out"), &options).unwrap_err().to_string();
    assert!(message.contains("names: expected one for each of 2 adapters, got 1"), "{message}");
}

/// For one module with one column, rank one and A = 1, factors are vectors: the example of four entries.
#[test]
fn ties_of_four_entries() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [[4.0f32, -1.0, 0.5, 2.0], [-3.0, 2.0, 0.1, 1.0]];
    let dirs: Vec<PathBuf> = ["a", "b"].iter().map(|name| folder.path().join(name)).collect();
    for (dir, row) in dirs.iter().zip(rows) {
        let change = |name: &str, i: usize, _| if name.contains("lora_A") { 1.0 } else { row[i] };
        super::write_with(dir, &lora(1, 1.0), &[("w", 4, 1)], 1, Manifest::new("adapter"), change);
    }
    for (weights, space, expected) in [
        ([1.0, 1.0], Space::Factors, [4.0, 2.0, 0.0, 2.0]),
        ([1.0, 1.0], Space::Delta, [4.0, 2.0, 0.0, 2.0]),
        ([0.2, 0.9], Space::Delta, [0.8, 1.8, 0.0, 0.4]),
    ] {
        let options = CombineOptions { space, weights: weights.to_vec(), density: vec![0.5], ..by("ties") };
        let got = deltas(&combined(&dirs, &options).1);
        assert!(distance(&got["w"], &expected) < 1e-6, "{space:?} {weights:?}: {:?}", got["w"]);
    }
    // mergekit elects minus in the first entry and divides by the weights.
    let options =
        CombineOptions { weights: vec![0.2, 0.9], density: vec![0.5], profile: Profile::Mergekit, ..by("ties") };
    let got = deltas(&combined(&dirs, &options).1);
    assert!(distance(&got["w"], &[-3.0, 2.0, 0.0, 2.0]) < 1e-6, "{:?}", got["w"]);
}

/// The papers' TIES trims the whole adapter: a module with only small entries keeps none.
#[test]
fn a_trim_of_the_whole_adapter_compares_modules() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a");
    let change = |name: &str, _, value: f32| if name.contains("small") { 0.01 * value } else { value };
    let modules = [("m.small", 12, 12), ("m.large", 12, 12)];
    super::write_with(&dir, &lora(2, 2.0), &modules, 4, Manifest::new("adapter"), change);
    let norms = |trim| {
        let mut options = CombineOptions { density: vec![0.3], rank: Some(12), ..by("ties") };
        options.parameters.trim = Some(trim);
        let got = deltas(&combined(std::slice::from_ref(&dir), &options).1);
        [norm(&got["m.small"]), norm(&got["m.large"])]
    };
    let ([small, _], [none, large]) = (norms(Trimmed::Tensor), norms(Trimmed::Model));
    assert!(small > 0.0 && none == 0.0 && large > 0.0, "{small} {none} {large}");
}

/// A weight of zero excludes an adapter, and a sum without terms is an adapter of zeros.
#[test]
fn nothing_is_an_adapter_too() {
    let dirs = fixtures(&["plain", "other"]);
    let options = |weights: [f64; 2]| CombineOptions { weights: weights.to_vec(), ..by("linear") };
    let (_folder, out, _) = combined(&dirs, &options([0.0, 1.0]));
    assert_eq!(Adapter::open(&out).unwrap().config().r, 2);
    assert!(farthest(&deltas(&out), &deltas(&dirs[1])) < 1e-7);
    let (_folder, out, report) = combined(&dirs, &options([0.0, 0.0]));
    assert!(deltas(&out).values().all(|delta| norm(delta) == 0.0));
    assert_eq!((report.total.energy, report.total.relative_error), (1.0, 0.0));
}

/// Values are rounded once to the output dtype, and the report includes the error.
#[test]
fn narrow_types_are_in_the_reported_error() {
    let dirs = fixtures(&["plain", "other"]);
    let dtype = cl_merge::FloatType::Bfloat16;
    let (_folder, out, report) = combined(&dirs, &CombineOptions { dtype, ..by("linear") });
    assert_eq!(
        Adapter::open(&out).unwrap().info("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight").unwrap().dtype,
        Dtype::BF16
    );
    let expected = weighted_sum(&dirs, &[1.0, 1.0]);
    let got = deltas(&out);
    for module in &report.modules {
        let error = distance(&got[&module.module], &expected[&module.module]) / norm(&expected[&module.module]);
        assert!((error - module.relative_error).abs() < 1e-6 && error > 1e-4, "{error} {}", module.relative_error);
    }
}

/// Module names that, as regular expressions, also match other modules.
#[test]
fn patterns_name_their_modules_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dirs: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| folder.path().join(name)).collect();
    // `q` also matches the end of `x.q`, and the dot of `x.q` matches any character.
    write(&dirs[0], &lora(1, 1.0), &[("q", 6, 6), ("x.q", 6, 6)], 1);
    write(&dirs[1], &lora(2, 2.0), &[("q", 6, 6)], 2);
    write(&dirs[2], &lora(3, 2.0), &[("x.q", 6, 6), ("x.v", 6, 6), ("y.v", 6, 6), ("z.v", 6, 6)], 2);
    let (_folder, out, _) = combined(&dirs, &by("cat"));
    let adapter = Adapter::open(&out).unwrap();
    let ranks: Vec<(String, usize)> = adapter.modules().iter().map(|m| (m.name.clone(), m.rank())).collect();
    assert_eq!(ranks[..2], [("q".to_owned(), 3), ("x.q".to_owned(), 4)]);
    assert!(
        adapter.config().rank_pattern.iter().any(|(key, _)| key.key().starts_with('^'))
            || ranks[0].1 == adapter.config().r
    );
    assert!(farthest(&deltas(&out), &weighted_sum(&dirs, &[1.0; 3])) < 1e-6);
}

/// Target modules are such that PEFT adapts exactly these modules.
#[test]
fn targets_are_those_agreed_on_or_whole_names_or_exact_last_parts() {
    let targets = |dirs: &[PathBuf], base: Option<PathBuf>| {
        let (_folder, out, _) = combined(dirs, &CombineOptions { base, ..by("linear") });
        match Adapter::open(&out).unwrap().config().target_modules.clone().unwrap() {
            cl_checkpoint::TargetModules::List(list) => list,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(targets(&fixtures(&["rslora", "rslora"]), None), ["q_proj", "v_proj"]);
    let whole = targets(&fixtures(&["rslora", "patterns"]), None);
    assert!(whole.contains(&"model.layers.0.self_attn.q_proj".to_owned()) && whole.len() == 4, "{whole:?}");
    let last = targets(&fixtures(&["rslora", "patterns"]), Some(fixture("untied")));
    assert_eq!(last, ["down_proj", "k_proj", "q_proj", "v_proj"]);
}

#[test]
fn folding_a_combination_is_folding_its_parts() {
    let dirs = fixtures(&["plain", "rslora", "patterns"]);
    let weights = vec![0.5, 1.0, -0.25];
    let base = Checkpoint::open(&fixture("untied")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let fold = |name: &str, dirs: &[PathBuf], weights: Vec<f64>, threads: usize| {
        let adapters = cl_merge::adapter::open(dirs).unwrap();
        let options = FoldOptions { weights, threads, ..FoldOptions::default() };
        let out = folder.path().join(name);
        fold_with(&base, &adapters, &out, Manifest::new("model"), &options).unwrap();
        out
    };
    let parts = fold("parts", &dirs, weights.clone(), 1);
    let (_folder, whole, _) = combined(&dirs, &CombineOptions { weights: weights.clone(), ..by("linear") });
    let whole = fold("whole", &[whole], Vec::new(), 1);
    let (x, y) = (Checkpoint::open(&parts).unwrap(), Checkpoint::open(&whole).unwrap());
    for name in x.names() {
        let pairs = x.load_f32(name).unwrap().into_iter().zip(y.load_f32(name).unwrap());
        assert!(pairs.into_iter().all(|(x, y)| (x - y).abs() < 1e-6), "{name}");
    }
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(bytes(&parts) == bytes(&fold("threads", &dirs, weights, 3)));
    let backwards: Vec<PathBuf> = dirs.iter().rev().cloned().collect();
    assert!(bytes(&parts) == bytes(&fold("backwards", &backwards, vec![-0.25, 1.0, 0.5], 2)));
}

/// In bf16, the sum of three adapters is rounded once; folding one after another rounds three times, and the report
/// contains the difference.
#[test]
fn drift_is_what_folding_one_after_another_differs_by() {
    let folder = tempfile::tempdir().unwrap();
    Llama { layers: 1, ..Llama::default() }.write(&folder.path().join("base"), 0);
    let base = Checkpoint::open(&folder.path().join("base")).unwrap();
    let dirs: Vec<PathBuf> = (0..3).map(|i| folder.path().join(format!("a{i}"))).collect();
    for (i, dir) in dirs.iter().enumerate() {
        write(dir, &lora(2, 0.1), &[("model.layers.0.mlp.up_proj", 32, 16)], i as u64);
    }
    let adapters = cl_merge::adapter::open(&dirs).unwrap();
    let once = folder.path().join("once");
    let options = FoldOptions { drift: true, ..FoldOptions::default() };
    let report = fold_with(&base, &adapters, &once, Manifest::new("model"), &options).unwrap();
    let drift = report.drift.unwrap();
    let mut last = folder.path().join("base");
    for (i, adapter) in adapters.into_iter().enumerate() {
        let out = folder.path().join(format!("m{i}"));
        let base = Checkpoint::open(&last).unwrap();
        fold_with(&base, &[adapter], &out, Manifest::new("model"), &FoldOptions::default()).unwrap();
        last = out;
    }
    let name = "model.layers.0.mlp.up_proj.weight";
    let (once, sequence) = (Checkpoint::open(&once).unwrap(), Checkpoint::open(&last).unwrap());
    let (once, sequence) = (once.load_f32(name).unwrap(), sequence.load_f32(name).unwrap());
    let differences: Vec<f64> = once.iter().zip(&sequence).map(|(x, y)| f64::from((x - y).abs())).collect();
    let total = &drift.total;
    assert_eq!(total.max, differences.iter().copied().fold(0.0, f64::max));
    assert_eq!(total.differing, differences.iter().filter(|d| **d > 0.0).count());
    assert!((total.mean - differences.iter().sum::<f64>() / 512.0).abs() < 1e-12);
    let update = norm(&weighted_sum(&dirs, &[1.0; 3])["model.layers.0.mlp.up_proj"]);
    assert!((total.relative - norm(&differences) / update).abs() < 1e-6, "{total:?}");
    assert!(total.differing > 0 && total.elements == 512 && drift.modules.len() == 1);
    assert!(0.0 < total.once && total.once < total.repeated, "{total:?}");
    assert!(report.max_rounding_error > 0.0);
    // Everything else is unchanged, byte for byte.
    let after = Checkpoint::open(&folder.path().join("once")).unwrap();
    for other in base.names().into_iter().filter(|n| *n != name) {
        assert!(base.bytes(other).unwrap() == after.bytes(other).unwrap(), "{other}");
    }
}

/// Extraction from a model into which an adapter was folded returns the adapter, up to the model's rounding.
#[test]
fn what_was_folded_can_be_extracted() {
    let folder = tempfile::tempdir().unwrap();
    let base = fixture("untied");
    for (name, targets) in
        [("plain", vec![]), ("embedding", vec!["embed_tokens", "q_proj"]), ("head", vec!["lm_head", "q_proj"])]
    {
        let (tuned, out) = (folder.path().join(format!("{name}-model")), folder.path().join(name));
        let adapters = cl_merge::adapter::open(&[fixture(name)]).unwrap();
        let checkpoint = Checkpoint::open(&base).unwrap();
        fold_with(&checkpoint, &adapters, &tuned, Manifest::new("model"), &FoldOptions::default()).unwrap();
        let targets: Vec<String> = targets.iter().map(|t| (*t).to_owned()).collect();
        let options = ExtractOptions { rank: 3, targets, ..ExtractOptions::default() };
        let report = extract(&base, &tuned, &out, &options).unwrap();
        // Weights near 1 were rounded to f32, which is 1e-7 of updates of about 1.
        assert!(farthest(&deltas(&out), &deltas(&fixture(name))) < 2e-6, "{name}");
        assert!(report.untouched.is_empty() && report.total.energy > 0.999_999, "{name}");
        let kinds = |dir: &Path| {
            let adapter = Adapter::open(dir).unwrap();
            let kinds: Vec<LayerKind> = adapter.modules().iter().map(|m| m.kind).collect();
            kinds
        };
        assert_eq!(kinds(&out), kinds(&fixture(name)));
    }
    // Embeddings that are not among the targets are left out and reported.
    let tuned = folder.path().join("embedding-model");
    let report = extract(&base, &tuned, &folder.path().join("rest"), &ExtractOptions::default()).unwrap();
    assert_eq!(report.untouched.len(), 1);
    assert_eq!(report.untouched[0].tensor, "model.embed_tokens.weight");
    let expected = norm(&deltas(&fixture("embedding"))["model.embed_tokens"]);
    assert!((report.untouched[0].norm - expected).abs() < 1e-5 * expected);
    let bytes = |threads: usize| {
        let out = folder.path().join(format!("threads-{threads}"));
        extract(&base, &tuned, &out, &ExtractOptions { threads, ..ExtractOptions::default() }).unwrap();
        files(&out)
    };
    assert!(bytes(1) == bytes(3));
}

/// With full rank and all other modules stored in full, extraction and folding reproduce a fully fine-tuned model.
#[test]
fn a_fully_tuned_model_is_its_base_and_an_adapter() {
    for tied in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (a, b, out) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("out"));
        let small = Llama { tied, ..Llama::default() };
        small.write(&a, 0);
        small.write(&b, 1);
        let modules_to_save = ["norm", "embed_tokens", "lm_head"].into_iter().take(if tied { 2 } else { 3 });
        let modules_to_save = modules_to_save.map(str::to_owned).collect();
        let options = ExtractOptions { rank: 64, modules_to_save, ..ExtractOptions::default() };
        let report = extract(&a, &b, &out, &options).unwrap();
        assert!(report.untouched.is_empty(), "{:?}", report.untouched);
        assert!(report.saved.contains(&"model.layers.0.input_layernorm.weight".to_owned()), "{:?}", report.saved);
        let (base, tuned) = (Checkpoint::open(&a).unwrap(), Checkpoint::open(&b).unwrap());
        let model = folder.path().join("model");
        let adapters = cl_merge::adapter::open(&[out]).unwrap();
        fold_with(&base, &adapters, &model, Manifest::new("model"), &FoldOptions::default()).unwrap();
        let folded = Checkpoint::open(&model).unwrap();
        assert_eq!(folded.names(), tuned.names());
        for name in tuned.names() {
            // Updates are accurate to f32, so they round to the same bf16 values.
            assert!(folded.bytes(name).unwrap() == tuned.bytes(name).unwrap(), "{name}");
        }
    }
}

#[test]
fn descriptions_and_comparisons_agree_with_dense_updates() {
    let dirs = fixtures(&["plain", "other", "patterns"]);
    let described = info(&dirs[2]).unwrap();
    assert_eq!((described.r, described.alpha, described.dtypes.len()), (2, 4.0, 1));
    assert_eq!(described.modules.iter().map(|m| m.rank).collect::<Vec<_>>(), [3, 1, 2]);
    let dense = deltas(&dirs[2]);
    for module in &described.modules {
        assert!((module.norm - norm(&dense[&module.module])).abs() < 1e-9);
        assert!(module.effective_rank >= 1.0 && module.effective_rank <= module.rank as f64 + 1e-9);
    }
    let (a, b) = (deltas(&dirs[0]), deltas(&dirs[1]));
    let diff = compare(&dirs[0], &dirs[1]).unwrap();
    assert_eq!(diff.modules.len(), 7);
    for module in &diff.modules {
        let (x, y) = (&a[&module.module], &b[&module.module]);
        let dot: f64 = x.iter().zip(y).map(|(x, y)| x * y).sum();
        assert!((module.norm_a - norm(x)).abs() < 1e-9 && (module.norm_b - norm(y)).abs() < 1e-9);
        assert!((module.norm_diff - distance(x, y)).abs() < 1e-9);
        assert!((module.cosine - dot / norm(x) / norm(y)).abs() < 1e-9);
        assert!((0.0..=1.0).contains(&module.overlap_a) && (0.0..=1.0).contains(&module.overlap_b));
    }
    let same = compare(&dirs[0], &dirs[0]).unwrap().total;
    assert!((same.cosine - 1.0).abs() < 1e-12 && (same.overlap_a - 1.0).abs() < 1e-9 && same.norm_diff < 1e-9);
    let other = compare(&dirs[0], &dirs[2]).unwrap();
    assert_eq!((other.only_a.len(), other.only_b.len()), (4, 0));
    assert!((overlap(&[1.0, 0.0], &[0.0, 2.0], 2).unwrap()).abs() < 1e-12);
    assert!(overlap(&[1.0, 0.0, 1.0], &[0.0, 2.0], 2).is_err() && overlap(&[f32::NAN, 0.0], &[0.0, 2.0], 2).is_err());
}

/// The manifest records the adapters and the hashes of their contents.
#[test]
fn outputs_say_where_they_come_from() {
    let dirs = fixtures(&["plain", "other"]);
    let (_folder, out, report) = combined(&dirs, &by("linear"));
    let manifest = Manifest::read(&out).unwrap();
    assert_eq!(manifest.sources.len(), 2);
    assert!(manifest.sources.iter().all(|s| s.role == "adapter" && s.blake3.is_some()));
    assert!(Manifest::verify(&out).unwrap().is_empty());
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("library_name: peft") && card.contains("\"linear\"") && report.parameters > 0);
    let copy = tempfile::tempdir().unwrap();
    let again = copy.path().join("out");
    assert!(combine(&dirs, &again, &by("linear")).is_ok() && files(&again) == files(&out));
}
