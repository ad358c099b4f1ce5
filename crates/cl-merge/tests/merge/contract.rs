//! Properties that every method must have, as far as its definition allows. A new method in the registry is tested
//! automatically.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, Dtype, TensorSource};
use cl_merge::{Base, METHODS, MergeFile, MergeOptions, MethodInfo, Plan, Profile, merge};

use super::models::Llama;
use super::{run, values};

/// Returns a merge file for a method, with as many models as it takes.
fn text(info: &MethodInfo, base: &Path, models: &[PathBuf], parameters: &str, of_models: &str) -> String {
    let base = if info.base == Base::Input {
        String::new()
    } else {
        format!("base_model = {:?}\n", base.display().to_string())
    };
    let needed = match info.name {
        "slerp" => "t = 0.4\n",
        "nearswap" => "t = 0.005\n",
        _ => "",
    };
    let most = (*info.models.end()).min(models.len());
    let models: String = models[..most]
        .iter()
        .map(|m| format!("[[models]]\nmodel = {:?}\n{of_models}\n", m.display().to_string()))
        .collect();
    format!("{base}[method.{}]\n{needed}{parameters}\n{models}", info.name)
}

fn merged(text: &str) -> BTreeMap<String, Vec<f32>> {
    let file = MergeFile::from_toml(text).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let (_folder, checkpoint) = run(&file.stages[0]);
    values(&checkpoint).into_iter().collect()
}

/// Returns the bytes of all tensors.
fn bytes(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<u8>> {
    let load = |name: &str| (name.to_owned(), checkpoint.bytes(name).unwrap().to_vec());
    checkpoint.names().into_iter().map(load).collect()
}

fn merged_bytes(text: &str, options: MergeOptions) -> BTreeMap<String, Vec<u8>> {
    let file = MergeFile::from_toml(text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    merge(&Plan::new(&file.stages[0]).unwrap(), &out, &options, &|_| ()).unwrap();
    bytes(&Checkpoint::open(&out).unwrap())
}

fn assert_close(what: &str, a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>, tolerance: f32) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{what}");
    for (name, x) in a {
        for (i, (x, y)) in x.iter().zip(&b[name]).enumerate() {
            assert!((x - y).abs() <= tolerance, "{what}: {name}[{i}] is {x}, not {y}");
        }
    }
}

fn of(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    values(&Checkpoint::open(dir).unwrap()).into_iter().collect()
}

fn takes(info: &MethodInfo, parameter: &str) -> bool {
    info.parameters.contains(&parameter)
}

/// Models are exact in bf16, and merges are written in f32 so that rounding does not hide differences.
const F32: &str = "dtype = \"float32\"\n";

/// Merging a model with itself returns the model.
#[test]
fn a_model_merged_with_itself_is_itself() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 1);
    let model = &models[0];
    for info in METHODS {
        // A sum of task vectors is not a mean, so the weights are chosen to sum to one.
        let least = *info.models.start();
        let n = (*info.models.end()).min(3).max(least);
        let same = vec![model.clone(); n];
        let parameters = match info.name {
            "task_arithmetic" | "dare_linear" | "della_linear" | "breadcrumbs" => "divisor = \"count\"",
            "consensus" => "lambda = 0.3333333333333333",
            // Small changes count as changes.
            "ram" | "ramplus_tl" => "epsilon = 0.0",
            // A common scale would equalize matrices, which are orthogonalized against each other, and vectors, which
            // are not.
            "opcm" => "norms = \"tensor\"",
            _ => "",
        };
        let out = merged(&format!("{F32}{}", text(info, &base, &same, parameters, "")));
        let expected = match info.name {
            // These methods interpolate between base and model, so the base is the same model here.
            "slerp" | "nearswap" | "arcee_fusion" | "model_stock" => {
                let out = merged(&format!("{F32}{}", text(info, model, &copies(folder.path(), model, n), "", "")));
                assert_close(info.name, &out, &of(model), 2e-7);
                continue;
            }
            // Decorrelating or flattening the spectrum changes the matrix even for a single task. The case without any
            // change is tested below.
            "tsv" | "iso_c" | "iso_cts" => continue,
            // Each further task is orthogonalized against the first, so a copy adds nothing.
            _ => of(model),
        };
        let tolerance = if matches!(info.name, "knots" | "opcm") { 1e-5 } else { 3e-7 };
        assert_close(info.name, &out, &expected, tolerance);
    }
}

/// Creates copies of a model under other names, because a base cannot also be one of the models.
fn copies(folder: &Path, model: &Path, n: usize) -> Vec<PathBuf> {
    (0..n)
        .map(|i| {
            let copy = folder.join(format!("copy{i}"));
            if !copy.exists() {
                std::fs::create_dir(&copy).unwrap();
                for entry in std::fs::read_dir(model).unwrap() {
                    let path = entry.unwrap().path();
                    std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
                }
            }
            copy
        })
        .collect()
}

/// Merging models that equal the base returns the base with every method; norms of zero do not give NaN.
#[test]
fn no_change_at_all_gives_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let (base, _) = Llama::default().family(folder.path(), 0);
    let same = copies(folder.path(), &base, 3);
    for info in METHODS.iter().filter(|info| info.base != Base::Input) {
        let density = if takes(info, "density") { "density = 0.5" } else { "" };
        let out = merged(&format!("{F32}{}", text(info, &base, &same, density, "")));
        assert_close(info.name, &out, &of(&base), 2e-7);
    }
}

/// If all weight is on one model, the result is that model.
#[test]
fn all_weight_on_one_model_returns_it() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 3);
    for info in METHODS.iter().filter(|info| takes(info, "weight") && info.name != "knots") {
        let mut file = MergeFile::from_toml(&format!("{F32}{}", text(info, &base, &models, "", ""))).unwrap();
        let stage = &mut file.stages[0];
        if takes(info, "divisor") {
            // With the divisor `count`, the mean would still be over all models.
            stage.method.parameters.divisor = Some(cl_merge::DivisorChoice::Weight);
        }
        if takes(info, "election") {
            stage.method.parameters.election = Some(cl_merge::Election::Weighted);
        }
        for (i, model) in stage.models.iter_mut().enumerate() {
            model.parameters.weight = Some((if i == 1 { 1.0 } else { 0.0 }).into());
        }
        let (_folder, out) = run(stage);
        assert_close(info.name, &values(&out).into_iter().collect(), &of(&models[1]), 2e-7);
    }
}

/// The order of the models does not change a bit, unless the method depends on the order.
#[test]
fn order_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 4);
    let reversed: Vec<PathBuf> = models.iter().rev().cloned().collect();
    for info in METHODS.iter().filter(|info| !info.ordered) {
        let density = if takes(info, "density") { "density = 0.5" } else { "" };
        let a = merged_bytes(&text(info, &base, &models, density, ""), MergeOptions::default());
        let b = merged_bytes(&text(info, &base, &reversed, density, ""), MergeOptions::default());
        assert!(a == b, "{}", info.name);
    }
}

/// The bytes do not depend on the number of threads, input files or output files.
#[test]
fn threads_and_shards_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Llama { hidden: 64, vocab: 700, ..Llama::default() };
    let (base, models) = whole.family(&folder.path().join("whole"), 3);
    let sharded = Llama { max_shard_size: 20_000, ..whole };
    let (base_sharded, models_sharded) = sharded.family(&folder.path().join("sharded"), 3);
    assert!(Checkpoint::open(&base_sharded).unwrap().files().count() > 3);
    for info in METHODS {
        // Masks are keyed by names, not by paths.
        let text = |base: &Path, models: &[PathBuf]| {
            let density = if takes(info, "density") { "density = 0.5" } else { "" };
            let mut text = text(info, base, models, density, "name = \"NAME\"");
            for i in 0.. {
                let Some(at) = text.find("NAME") else { break };
                text.replace_range(at..at + 4, &format!("m{i}"));
            }
            text
        };
        let one = MergeOptions { threads: 1, ..MergeOptions::default() };
        let many = MergeOptions { threads: 5, max_shard_size: 15_000, memory: 200 << 20, ..MergeOptions::default() };
        let a = merged_bytes(&text(&base, &models), one);
        assert!(a == merged_bytes(&text(&base, &models), many.clone()), "{}: threads", info.name);
        assert!(a == merged_bytes(&text(&base_sharded, &models_sharded), many), "{}: shards", info.name);
    }
}

/// Density 0 keeps nothing and density 1 everything; neither divides by zero.
#[test]
fn density_zero_and_one() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 3);
    for info in METHODS.iter().filter(|info| takes(info, "density")) {
        let zero = merged(&format!("{F32}{}", text(info, &base, &models, "density = 0.0", "")));
        assert_close(info.name, &zero, &of(&base), 0.0);
        // Nothing is random then, so another seed gives the same result.
        let one =
            |seed: u64| merged(&format!("seed = {seed}\n{F32}{}", text(info, &base, &models, "density = 1.0", "")));
        assert!(one(1) == one(2), "{}", info.name);
        assert!(one(1) != of(&base), "{}", info.name);
    }
}

/// Random masks depend on the seed, keep about the given density, and differ between models.
#[test]
fn random_masks_follow_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let llama = Llama { hidden: 32, vocab: 300, ..Llama::default() };
    let (base, models) = llama.family(folder.path(), 2);
    for info in METHODS.iter().filter(|i| matches!(i.name, "dare_linear" | "dare_ties" | "della" | "della_linear")) {
        let epsilon = if takes(info, "epsilon") { "epsilon = 0.1\n" } else { "" };
        let out = |seed: u64, models: &[PathBuf]| {
            let parameters = format!("{epsilon}density = 0.3");
            merged(&format!("seed = {seed}\n{F32}{}", text(info, &base, models, &parameters, "")))
        };
        let (one, other) = (out(1, &models), out(2, &models));
        assert!(one == out(1, &models), "{}: one seed, one result", info.name);
        assert!(one != other, "{}: another seed", info.name);
        let table = "model.embed_tokens.weight";
        let kept = |values: &BTreeMap<String, Vec<f32>>| {
            let base = &of(&base)[table];
            values[table].iter().zip(base).map(|(x, b)| x != b).collect::<Vec<bool>>()
        };
        // Of 9,600 entries, a fraction of 0.3 is kept; its standard deviation is 0.0047, and one in a hundred entries
        // is already zero.
        let alone = kept(&out(1, &models[..1]));
        let share = alone.iter().filter(|k| **k).count() as f64 / alone.len() as f64;
        assert!((share - 0.3).abs() < 0.03, "{}: {share}", info.name);
        // Independent masks agree on a fraction of 0.3² + 0.7² of the entries.
        let second = kept(&out(1, &models[1..]));
        let agree = alone.iter().zip(&second).filter(|(a, b)| a == b).count() as f64 / alone.len() as f64;
        assert!((agree - 0.58).abs() < 0.04, "{}: {agree}", info.name);
    }
}

/// Inputs can have any floating-point dtype, also different ones.
#[test]
fn dtypes_may_be_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    for (name, dtype) in [("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::BF16)] {
        Llama { dtype, ..Llama::default() }.write(&dir(name), 1);
    }
    let linear = METHODS.iter().find(|m| m.name == "linear").unwrap();
    let models = [dir("f32"), dir("f16"), dir("bf16")];
    for (dtype, tolerance) in [("float32", 3e-3), ("float16", 3e-3), ("bfloat16", 7e-3)] {
        let out = merged(&format!("dtype = \"{dtype}\"\n{}", text(linear, &models[0], &models, "", "")));
        assert_close(dtype, &out, &of(&models[0]), tolerance);
    }
    // Without a dtype, each tensor keeps that of the first model.
    let file = MergeFile::from_toml(&text(linear, &models[0], &models, "", "")).unwrap();
    let (_folder, out) = run(&file.stages[0]);
    assert!(out.names().iter().all(|n| out.info(n).unwrap().dtype == Dtype::F32));
}

/// The profiles differ only where tools differ.
#[test]
fn profiles_choose_definitions() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 3);
    let out = |name: &str, profile: Profile, parameters: &str| {
        let info = METHODS.iter().find(|m| m.name == name).unwrap();
        let mut file = MergeFile::from_toml(&text(info, &base, &models, parameters, "")).unwrap();
        file.stages[0].profile = profile;
        // With equal weights, a weighted election could not be distinguished.
        for (i, model) in file.stages[0].models.iter_mut().enumerate() {
            model.parameters.weight = Some((0.4 + i as f64).into());
        }
        let (_folder, checkpoint) = run(&file.stages[0]);
        bytes(&checkpoint)
    };
    let profiles = [Profile::Method, Profile::Paper, Profile::Mergekit];
    for name in ["ties", "dare_ties"] {
        let [method, paper, mergekit] = profiles.map(|p| out(name, p, "density = 0.3"));
        assert!(method != paper && paper != mergekit && method != mergekit, "{name}");
    }
    // Setting the definitions by name gives the same result as the profile.
    let named = "density = 0.3\ntrim = \"tensor\"\nelection = \"weighted\"\ndivisor = \"weight\"";
    assert!(out("ties", Profile::Method, named) == out("ties", Profile::Mergekit, "density = 0.3"));
    let named = "density = 0.3\nrescale = \"none\"";
    assert!(out("dare_ties", Profile::Method, named) == out("dare_ties", Profile::Paper, "density = 0.3"));
    // For methods with a single definition, the profile changes nothing.
    let [method, paper, mergekit] = profiles.map(|p| out("linear", p, ""));
    assert!(method == paper && method == mergekit);
}

/// Merging a sequence incrementally gives the same result as merging it at once.
#[test]
fn opcm_goes_on_from_its_own_output() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 4);
    let file = |models: &[PathBuf], parameters: &str| {
        let list: String = models.iter().map(|m| format!("[[models]]\nmodel = {m:?}\n")).collect();
        let text = format!("{F32}base_model = {base:?}\n[method.opcm]\n{parameters}\n{list}");
        MergeFile::from_toml(&text).unwrap().stages.remove(0)
    };
    for norms in ["model", "tensor"] {
        let norms = format!("norms = \"{norms}\"");
        let (_folder, at_once) = run(&file(&models, &norms));
        let (first, _) = run(&file(&models[..2], &norms));
        let first = first.path().join("out");
        let (second, _) = run(&file(&models[2..3], &format!("{norms}\nprevious = {first:?}")));
        let second = second.path().join("out");
        let (_folder, grown) = run(&file(&models[3..], &format!("{norms}\nprevious = {second:?}")));
        let all = |checkpoint: &Checkpoint| values(checkpoint).into_iter().collect();
        assert_close("opcm", &all(&grown), &all(&at_once), 1e-6);
    }
    let text = format!(
        "base_model = {base:?}\n[method.opcm]\nprevious = {:?}\n[[models]]\nmodel = {:?}\n",
        models[0], models[1]
    );
    let error = Plan::new(&MergeFile::from_toml(&text).unwrap().stages[0]).err().unwrap().to_string();
    assert!(error.contains("merge_state.json") && error.contains("earlier opcm merge"), "{error}");
}
