//! mergekit's YAML: keys that it ignores, our additional keys, and errors of invalid files.

use std::fs;
use std::path::Path;

use cl_checkpoint::TensorSource;
use cl_merge::{Error, MergeFile, Plan};

use super::models::Llama;
use super::run;

/// Reads a merge file with models named BASE, AAA and BBB.
fn read(folder: &Path, text: &str) -> Result<MergeFile, String> {
    let path = folder.join("merge.yaml");
    let place = |text: &str, name: &str, dir: &str| text.replace(name, &folder.join(dir).display().to_string());
    fs::write(&path, place(&place(&place(text, "BASE", "base"), "AAA", "ft1"), "BBB", "ft2")).unwrap();
    MergeFile::read(&path).map_err(|error| error.to_string())
}

fn notes(folder: &Path, text: &str) -> Vec<String> {
    let file = read(folder, text).unwrap_or_else(|e| panic!("{e}"));
    let plan = Plan::new(&file.stages[0]).unwrap_or_else(|e| panic!("{text}\n{e}"));
    plan.notes
}

fn problems(folder: &Path, text: &str) -> String {
    match Plan::new(&read(folder, text).unwrap_or_else(|e| panic!("{e}")).stages[0]) {
        Err(error @ Error::Problems(_)) => error.to_string(),
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn parameters_of_other_methods_are_ignored_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    Llama::default().family(folder.path(), 2);
    let file = |method: &str, of_model: &str, shared: &str| {
        format!(
            "merge_method: {method}\nbase_model: BASE\nmodels:\n  - model: AAA\n    parameters: {{{of_model}}}\n  - model: BBB\n\
             parameters: {{{shared}}}\n"
        )
    };
    for (method, of_model, shared, expected) in [
        ("model_stock", "weight: [0.1, 1]", "int8_mask: true", vec!["int8_mask", "weight"]),
        ("task_arithmetic", "weight: 1, density: 0.5", "weight: 0.5", vec!["density"]),
        ("ties", "density: 0.5, gamma: 0.01", "weight: 1, dtype: bfloat16", vec!["dtype", "gamma"]),
        ("ties", "density: 0.5", "weight: 1, window_size: 2, t: 0.5", vec!["t", "window_size"]),
        (
            "nuslerp",
            "weight: 1, density: 1, int8_mask: 1",
            "weight: 1, normalize: true",
            vec!["density", "int8_mask", "normalize"],
        ),
        ("ties", "density: 0.5", "weight: 1, int8_mask: true, normalize: true", vec![]),
    ] {
        let found = notes(folder.path(), &file(method, of_model, shared));
        let expected: Vec<String> =
            expected.into_iter().map(|name| format!("`{name}` has no effect with {method}")).collect();
        assert_eq!(found, expected);
    }
    // The result equals the merge without these keys.
    let values = |text: &str| {
        let (_folder, out) = run(&read(folder.path(), text).unwrap().stages[0]);
        super::values(&out)
    };
    assert!(
        values(&file("ties", "density: 0.5, gamma: 0.1", "weight: 1, t: 3"))
            == values(&file("ties", "density: 0.5", "weight: 1"))
    );
    // Misspelled keys are errors, and so are this crate's own parameters if the method does not have them.
    let found = problems(folder.path(), &file("ties", "densty: 0.5", "election: count"));
    assert!(found.contains("ties has no parameter `densty` (did you mean `density`?); it has weight"), "{found}");
    let found = problems(folder.path(), &file("model_stock", "weight: 1", "filterwise: true, trim: tensor"));
    assert!(found.contains("`filterwise` (did you mean `filter_wise`?)") && found.contains("`trim`"), "{found}");
    // TOML files do not follow mergekit's rules.
    let toml = "[method.linear]\ndensity = 0.5\n[[models]]\nmodel = \"x\"";
    let Err(error) = Plan::new(&MergeFile::from_toml(toml).unwrap().stages[0]) else { panic!() };
    assert!(error.to_string().contains("linear has no parameter `density`"), "{error}");
}

#[test]
fn other_things_that_mergekit_ignores() {
    let folder = tempfile::tempdir().unwrap();
    Llama::default().family(folder.path(), 2);
    let text = "merge_method: linear\nmodels:\n  - {model: AAA, layer_range: [0, 2], parameters: {weight: 1}}\n  \
                - {model: BBB, parameters: {weight: 1}}\n";
    let found = notes(folder.path(), text);
    assert!(found.len() == 1 && found[0].starts_with("`layer_range` has no effect under `models`"), "{found:?}");
    let text = |method: &str| {
        format!(
            "merge_method: slerp\nslices:\n  - sources:\n      - {{model: AAA, layer_range: [0, 2]}}\n      \
             - {{model: BBB, layer_range: [0, 2]}}\n    merge_method: {method}\n    base_model: AAA\n    parameters: {{t: 0.5}}\n"
        )
    };
    assert!(notes(folder.path(), &text("slerp")).is_empty());
    let found = notes(folder.path(), &text("linear"));
    assert!(found.len() == 1 && found[0].contains("the method of the file, slerp, is used"), "{found:?}");
    // mergekit's seed for all random choices is used as the seed of masks.
    let text = |seed: &str| format!("merge_method: dare_ties\nbase_model: BASE\nmodels: [{{model: AAA}}]\n{seed}\n");
    let seed = |text: &str| read(folder.path(), text).unwrap().stages[0].seed;
    assert_eq!(["random_seed: 7", "seed: 8", ""].map(|line| seed(&text(line))), [7, 8, 42]);
}

/// The keys that messages recommend are accepted.
#[test]
fn our_keys_in_mergekits_yaml() {
    let folder = tempfile::tempdir().unwrap();
    Llama { vocab: 41, ..Llama::default() }.write(&folder.path().join("ft2"), 2);
    Llama::default().write(&folder.path().join("ft1"), 1);
    let text = "merge_method: linear\nmodels:\n  - {model: AAA, parameters: {weight: 1}}\n  - {model: BBB, parameters: {weight: 1}}\n";
    let found = problems(folder.path(), text);
    assert!(found.contains("set `vocabulary` to"), "{found}");
    for (keys, rows) in
        [("vocabulary: common", 40), ("vocabulary: keep\nextra_tensors: union\nignore_tokenizers: true", 41)]
    {
        let (_folder, out) = run(&read(folder.path(), &format!("{text}{keys}\n")).unwrap().stages[0]);
        assert_eq!(out.info("model.embed_tokens.weight").unwrap().shape[0], rows);
    }
    let error = read(folder.path(), &format!("{text}vocabulary: most\n")).unwrap_err();
    assert!(error.contains("most") && error.contains("keep"), "{error}");
}

#[test]
fn errors_of_yaml_say_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    for (text, part) in [
        ("merge_method: linear\nmodels:\n  - AAA\n", "a mapping such as `- model: NAME`"),
        ("merge_method: linear\nmodels: AAA\n", "a list, of which each entry is a mapping such as `- model: NAME`"),
        (
            "merge_method: linear\nmodels:\n  model: AAA\n",
            "a list, of which each entry is a mapping such as `- model: NAME`",
        ),
        ("merge_method: linear\nslices:\n  - AAA\n", "`- sources: ["),
        ("merge_method: linear\nslices:\n  - sources: [AAA]\n", "`- {model: NAME, layer_range: [0, 16]}`"),
        ("merge_method: linear\nmodels: [{model: AAA, parameters: 0.5}]\n", "a mapping such as `weight: 0.5`"),
        ("merge_method: linear\nmodels: [{model: AAA, wieght: 0.5}]\n", "wieght"),
    ] {
        let error = read(folder.path(), text).unwrap_err();
        assert!(error.contains(part) && error.contains("line "), "{text}: {error}");
    }
    // A key without a value is ignored.
    assert!(read(folder.path(), "merge_method: linear\nmodels:\nslices:\nparameters:\n").is_ok());
}

#[test]
fn extensions() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = "merge_method: linear\nmodels: [{model: a}]\n";
    let read = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        MergeFile::read(&path).map_err(|error| error.to_string())
    };
    for name in ["a.yaml", "a.yml", "a.YAML", "a.Yml"] {
        assert_eq!(read(name, yaml).unwrap().stages[0].method.name, "linear");
    }
    for name in ["a", "a.txt", "a.yaml.bak"] {
        let error = read(name, yaml).unwrap_err();
        assert!(error.contains("the extension .yml or .yaml"), "{error}");
        assert!(read(name, "method = \"linear\"").is_ok());
    }
    assert!(!read("a.toml", yaml).unwrap_err().contains("extension"));
}

#[test]
fn a_base_of_passthrough_is_a_problem_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    Llama::default().family(folder.path(), 1);
    let found = problems(folder.path(), "merge_method: passthrough\nbase_model: BASE\nmodels: [{model: AAA}]\n");
    assert!(found.contains("base_model: passthrough merges exactly 1 model(s)"), "{found}");
    assert!(found.contains("remove `base_model`"), "{found}");
}

#[test]
fn a_pointer_of_git_lfs_is_called_so() {
    let folder = tempfile::tempdir().unwrap();
    let (_, models) = Llama::default().family(folder.path(), 1);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    fs::write(models[0].join("model.safetensors"), pointer).unwrap();
    let found = problems(folder.path(), "merge_method: linear\nmodels: [{model: AAA, parameters: {weight: 1}}]\n");
    assert!(
        found.contains("model.safetensors") && found.contains("is a Git LFS pointer") && found.contains("git lfs pull"),
        "{found}"
    );
}
