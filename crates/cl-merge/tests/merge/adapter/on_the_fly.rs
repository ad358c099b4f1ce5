//! `model+adapter` in a merge gives the same bytes as folding and then merging, without an intermediate model.

use std::fs;
use std::path::Path;

use cl_checkpoint::{Adapter, Checkpoint, Manifest, TensorSource};
use cl_merge::adapter::fold;
use cl_merge::{Error, MergeFile, MergeOptions, Plan, merge, run_file};

use super::super::models::Llama;
use super::{fixture, lora, write};

fn merged(text: &str, out: &Path, threads: usize) -> Checkpoint {
    let file = MergeFile::from_toml(text).unwrap_or_else(|e| panic!("{e}"));
    let plan = Plan::new(&file.stages[0]).unwrap_or_else(|e| panic!("{e}"));
    merge(&plan, out, &MergeOptions { threads, ..MergeOptions::default() }, &|_| ()).unwrap_or_else(|e| panic!("{e}"));
    Checkpoint::open(out).unwrap()
}

#[track_caller]
fn assert_same(a: &Checkpoint, b: &Checkpoint, what: &str) {
    assert_eq!(a.names(), b.names(), "{what}");
    for name in a.names() {
        assert_eq!(a.info(name), b.info(name), "{what}: {name}");
        assert!(a.bytes(name).unwrap() == b.bytes(name).unwrap(), "{what}: {name}");
    }
    assert_eq!(a.config(), b.config(), "{what}");
}

/// All kinds of adapters that PEFT wrote: factors, DoRA, tied and untied embeddings and heads, fully trained modules,
/// trained rows, added tokens.
#[test]
fn every_kind_of_adapter() {
    let text = fs::read_to_string(fixture("cases.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut compared = 0;
    for (case, record) in json["fold"].as_object().unwrap() {
        let adapters = record["adapters"].as_array().unwrap();
        let [adapter] = &adapters[..] else { continue };
        let base = fixture(record["base"].as_str().unwrap());
        let adapter = fixture(adapter.as_str().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let opened = (Checkpoint::open(&base).unwrap(), [Adapter::open(&adapter).unwrap()]);
        fold(&opened.0, &opened.1, &place("folded"), Manifest::new("model"), false).unwrap();
        let both = format!("{}+{}", base.display(), adapter.display());
        for method in ["passthrough", "linear"] {
            let of = |model: &str| format!("method = \"{method}\"\n[[models]]\nmodel = {model:?}\n");
            let first = merged(&of(place("folded").to_str().unwrap()), &place(&format!("{method}-a")), 1);
            let second = merged(&of(&both), &place(&format!("{method}-b")), 2);
            assert_same(&first, &second, &format!("{case}, {method}"));
        }
        compared += 1;
    }
    assert!(compared >= 15, "{compared}");
}

/// Matrices of several blocks, with a method that reads them more than once, as one of several models and as the base.
#[test]
fn large_matrices_and_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let llama = Llama { hidden: 400, layers: 1, vocab: 8, ..Llama::default() };
    let (base, models) = llama.family(folder.path(), 2);
    let modules = [("model.layers.0.mlp.up_proj", 800, 400), ("model.layers.0.self_attn.q_proj", 400, 400)];
    write(&place("adapter"), &lora(4, 0.5), &modules, 5);
    for (with, other) in [(&base, &models[1]), (&models[0], &models[1])] {
        let opened = (Checkpoint::open(with).unwrap(), [Adapter::open(&place("adapter")).unwrap()]);
        fold(&opened.0, &opened.1, &place("folded"), Manifest::new("model"), true).unwrap();
        let both = format!("{}+{}", with.display(), place("adapter").display());
        let of = |model: &str| {
            let (base, model) = if with == &base {
                (model.to_owned(), models[0].display().to_string())
            } else {
                (base.display().to_string(), model.to_owned())
            };
            format!(
                "base_model = {base:?}\n[method.ties]\ndensity = 0.3\n[[models]]\nmodel = {model:?}\nname = \"x\"\n\
                 [[models]]\nmodel = {other:?}\n"
            )
        };
        let first = merged(&of(place("folded").to_str().unwrap()), &place("a"), 1);
        for threads in [1, 3] {
            let out = place(&format!("b{threads}"));
            assert_same(&first, &merged(&of(&both), &out, threads), &format!("{both}, {threads} threads"));
            fs::remove_dir_all(out).unwrap();
        }
        fs::remove_dir_all(place("a")).unwrap();
    }
}

/// The output names model and adapter as sources, stages run again if the adapter has changed, and neither can be the
/// output directory.
#[test]
fn provenance_stages_and_problems() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let (base, models) = Llama::default().family(folder.path(), 1);
    let modules = [("model.layers.0.self_attn.q_proj", 16, 16)];
    write(&place("adapter"), &lora(2, 1.0), &modules, 5);
    let both = format!("{}+{}", base.display(), place("adapter").display());
    let text = format!("method = \"linear\"\n[[models]]\nmodel = {both:?}\n[[models]]\nmodel = {:?}\n", models[0]);
    let file = MergeFile::from_toml(&text).unwrap();
    let options = MergeOptions { hash_inputs: true, ..MergeOptions::default() };
    run_file(&file, &place("out"), &options, &|_| ()).unwrap();
    let manifest = Manifest::read(&place("out")).unwrap();
    let sources: Vec<(&str, &str)> = manifest.sources.iter().map(|s| (s.role.as_str(), s.path.as_str())).collect();
    let adapter = place("adapter").display().to_string();
    let paths = [base.display().to_string(), models[0].display().to_string()];
    assert_eq!(sources, [("model", paths[0].as_str()), ("adapter", adapter.as_str()), ("model", paths[1].as_str())]);
    let hash = Adapter::open(&place("adapter")).unwrap().content_hash().unwrap();
    assert_eq!(manifest.sources[1].blake3.as_deref(), Some(hash.as_str()));
    let card = fs::read_to_string(place("out/README.md")).unwrap();
    assert!(card.contains(&format!("- \"{adapter}\"")) && card.contains(&both), "{card}");
    for input in [&base, &place("adapter")] {
        let error = run_file(&file, input, &MergeOptions { overwrite: true, ..options.clone() }, &|_| ()).unwrap_err();
        assert!(!matches!(error, Error::Problems(_)) && Adapter::open(&place("adapter")).is_ok(), "{error}");
    }
    // A stage's result can have an adapter, too.
    let staged = format!(
        "[[stage]]\nname = \"pair\"\nmethod = \"linear\"\n[[stage.models]]\nmodel = {base:?}\n[[stage.models]]\nmodel = {:?}\n\
         [[stage]]\nmethod = \"passthrough\"\n[[stage.models]]\nmodel = \"pair+{adapter}\"\n",
        models[0]
    );
    run_file(&MergeFile::from_toml(&staged).unwrap(), &place("staged"), &options, &|_| ()).unwrap();
    // Incompatible adapters are reported as by folding.
    let problem = |model: &str| {
        let text = format!("method = \"passthrough\"\n[[models]]\nmodel = {model:?}\n");
        Plan::new(&MergeFile::from_toml(&text).unwrap().stages[0]).err().unwrap().to_string()
    };
    write(&place("other"), &lora(2, 1.0), &[("model.layers.0.self_attn.q_proj", 8, 16)], 5);
    assert!(
        problem(&format!("{}+{}", base.display(), place("other").display()))
            .contains("is for a weight of shape [8, 16]")
    );
    assert!(problem(&format!("{}+{}", base.display(), place("none").display())).contains("none"));
}
