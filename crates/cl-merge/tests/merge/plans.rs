//! Plans, and the problems that are reported before anything is written.

use std::fs;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSource, TensorSpec, WriteOptions};
use cl_merge::methods::SettingsError;
use cl_merge::problem::{ModelProblem, Place, ProblemKind};
use cl_merge::{Error, MergeFile, MergeOptions, Plan, estimate, merge, run_file};
use serde_json::json;

use super::models::Llama;
use super::{run, values};

fn config(text: &str) -> cl_merge::MergeConfig {
    MergeFile::from_toml(text).unwrap_or_else(|e| panic!("{e}")).stages.remove(0)
}

/// Returns the problems of a merge, which must have some.
fn problems(text: &str) -> Vec<String> {
    match Plan::new(&config(text)) {
        Err(Error::Problems(problems)) => problems.iter().map(ToString::to_string).collect(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("planned:\n{text}"),
    }
}

#[track_caller]
fn assert_problem(problems: &[String], parts: &[&str]) {
    assert!(problems.iter().any(|p| parts.iter().all(|part| p.contains(part))), "{parts:?} is not in {problems:#?}");
}

fn linear(models: &[&Path]) -> String {
    let list: String = models.iter().map(|m| format!("[[models]]\nmodel = {:?}\n", m.display().to_string())).collect();
    format!("method = \"linear\"\n{list}")
}

fn ties(base: &Path, models: &[PathBuf], parameters: &str) -> String {
    let list: String = models.iter().map(|m| format!("[[models]]\nmodel = {:?}\n", m.display().to_string())).collect();
    format!("base_model = {:?}\n[method.ties]\n{parameters}\n{list}", base.display().to_string())
}

#[test]
fn every_problem_is_said_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    Llama::default().write(&dir("a"), 1);
    Llama { hidden: 32, ..Llama::default() }.write(&dir("wide"), 1);
    Llama { layers: 3, ..Llama::default() }.write(&dir("deep"), 1);
    Llama { tied: false, ..Llama::default() }.write(&dir("untied"), 1);
    Llama { vocab: 41, ..Llama::default() }.write(&dir("padded"), 1);
    let text = format!(
        "{}densty = 3\ndensity = 0.5\nweight = [1.0, inf]\n",
        linear(&[&dir("a"), &dir("wide"), &dir("deep"), &dir("untied"), &dir("padded"), &dir("a")])
    );
    let found = problems(&text);
    assert_problem(&found, &["`densty`", "weight, normalize"]);
    assert_problem(&found, &["linear has no parameter `density`"]);
    assert_problem(&found, &["`weight` is not a finite number"]);
    assert_problem(&found, &["wide", "`hidden_size`", "32"]);
    assert_problem(&found, &["deep", "`num_hidden_layers`", "3"]);
    assert_problem(&found, &["different shapes", "q_proj"]);
    // Each problem is reported once.
    let mut once = found.clone();
    once.dedup();
    assert_eq!(once, found);
    let missing = problems(&linear(&[&dir("a"), &dir("nowhere"), &dir("neither")]));
    assert_problem(&missing, &["nowhere", "not found"]);
    assert_problem(&missing, &["neither", "not found"]);
}

/// Programs can inspect places and facts without parsing messages.
#[test]
fn problems_carry_their_facts() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    Llama::default().write(&dir("a"), 1);
    Llama { vocab: 41, ..Llama::default() }.write(&dir("padded"), 1);
    let written = |name: &str| dir(name).display().to_string();
    let Err(Error::Problems(found)) = Plan::new(&config(&linear(&[&dir("a"), &dir("padded")]))) else { panic!() };
    let ProblemKind::Model(ModelProblem::RowCounts { shapes }) = &*found[0].kind else { panic!("{found:?}") };
    let rows = |shape: &(Vec<usize>, Vec<String>)| (shape.0[0], shape.1.clone());
    let expected = [(Llama::default().vocab, vec![written("a")]), (41, vec![written("padded")])];
    assert_eq!(shapes.iter().map(rows).collect::<Vec<_>>(), expected);
    let Place::Tensor(tensor) = &found[0].place else { panic!("{found:?}") };
    assert!(found[0].to_string().starts_with(&format!("tensor `{tensor}` has different numbers of rows: ")));
    let Err(Error::Problems(found)) = Plan::new(&config(&linear(&[&dir("a"), &dir("nowhere")]))) else { panic!() };
    assert_eq!(found[0].place, Place::File(dir("nowhere")));
    let ProblemKind::Checkpoint(error) = &*found[0].kind else { panic!("{found:?}") };
    // The error names the directory, so the place is not repeated.
    assert_eq!(found[0].to_string(), error.to_string());
    let zero = linear(&[&dir("a")]).replace("[[models]]", "[[models]]\nweight = 0.0");
    let Err(Error::Problems(found)) = Plan::new(&config(&zero)) else { panic!() };
    // A problem that all tensors have is reported for the file.
    assert_eq!((found.len(), &found[0].place), (1, &Place::Whole));
    let zero_sum = ProblemKind::from(SettingsError::WeightsSumToZero { switch: "normalize" });
    assert_eq!(found[0].kind.to_string(), zero_sum.to_string());
}

#[test]
fn parameters_out_of_range_or_out_of_place() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 2);
    for (parameters, parts) in [
        ("density = 1.5", ["`density` is 1.5", "0 to 1"]),
        ("density = -0.1", ["`density` is -0.1", "0 to 1"]),
        ("density = nan", ["`density` is not a finite number", "0 to 1"]),
        ("density = [0.2, 7.0]", ["`density` is 7", "0 to 1"]),
        ("density = []", ["`density` is an empty list", "ties"]),
        ("density = [{ filter = \"mlp\", value = 2.0 }]", ["`density` is 2", "0 to 1"]),
        ("gamma = 0.1", ["ties has no parameter `gamma`", "density"]),
        ("density = [0.2, 0.5]", ["trimming over the whole model", "trim = \"tensor\""]),
    ] {
        assert_problem(&problems(&ties(&base, &models, parameters)), &parts);
    }
    let of_model = format!("{}lambda = 0.5\n", ties(&base, &models, ""));
    assert_problem(&problems(&of_model), &["`lambda` cannot be set for a single model"]);
    let slerp = format!("base_model = {:?}\nmethod = \"slerp\"\n[[models]]\nmodel = {:?}\n", base, models[0]);
    assert_problem(&problems(&slerp), &["slerp needs `t`"]);
    let della =
        format!("base_model = {:?}\n[method.della]\ndensity = 0.1\n[[models]]\nmodel = {:?}\n", base, models[0]);
    assert_problem(&problems(&della), &["density 0.1 ± epsilon 0.15", "smaller epsilon"]);
    let zero = linear(&[&models[0], &models[1]]).replace("[[models]]", "[[models]]\nweight = 0.0");
    assert_problem(&problems(&zero), &["the weights sum to zero"]);
}

#[test]
fn methods_bases_and_numbers_of_models() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 3);
    assert_problem(&problems(&linear(&[&base]).replace("linear", "lineal")), &["`lineal`", "linear, slerp"]);
    assert_problem(&problems(&linear(&[&base]).replace("linear", "ties")), &["ties needs a `base_model`"]);
    let stock = format!("base_model = {base:?}\nmethod = \"model_stock\"\n[[models]]\nmodel = {:?}\n", models[0]);
    assert_problem(&problems(&stock), &["at least 2 model(s) in addition to the base, not 1"]);
    let slerp = format!("{}[method.slerp]\nt = 0.5\n", ties(&base, &models, "").replace("[method.ties]\n", ""));
    assert_problem(&problems(&slerp), &["exactly 1 model(s) in addition to the base, not 3"]);
    assert_problem(&problems("method = \"linear\""), &["either `models` or `slices`"]);
    // A base that is listed among the models is not merged with itself.
    let listed = [vec![base.clone()], models.clone()].concat();
    let bytes = |models: &[PathBuf]| {
        let (_folder, out) = run(&config(&ties(&base, models, "density = 0.4")));
        values(&out)
    };
    assert!(bytes(&listed) == bytes(&models));
}

/// Texts that are not valid merge files.
#[test]
fn rubbish_is_refused_with_a_reason() {
    for (text, part) in [
        ("", "method"),
        ("method = \"linear\"\nmodls = []", "modls"),
        ("method = 3", "method"),
        ("[method]\n[method.ties]\n[method.linear]", "one method"),
        ("method = \"linear\"\n[[models]]\nweight = 1", "model"),
        ("= 3", "TOML"),
        ("method = {}", "none"),
        ("[method.ties]\ndensity = \"half\"", "a number"),
        ("[method.ties]\nrescale = \"halve\"", "rescale is"),
        ("method = \"ties\"\nprofile = \"papper\"", "papper"),
    ] {
        let error = MergeFile::from_toml(text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.yaml");
    fs::write(&path, "merge_method: linear\nmodels: 3").unwrap();
    let error = MergeFile::read(&path).unwrap_err().to_string();
    assert!(error.contains("x.yaml") && error.contains("line 2"), "{error}");
}

#[test]
fn values_that_are_not_finite_stop_the_merge_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (base, mut models) = Llama::default().family(folder.path(), 1);
    let bad = folder.path().join("bad");
    let name = "model.layers.1.self_attn.o_proj.weight";
    for value in [f32::NAN, f32::INFINITY] {
        Llama::default().write_with(&bad, 2, |tensor, i, v| if tensor == name && i == 37 { value } else { v });
        models.truncate(1);
        models.push(bad.clone());
        let out = folder.path().join("out");
        for text in [ties(&base, &models, "density = 0.5"), linear(&[&models[0], &bad])] {
            let plan = Plan::new(&config(&text)).unwrap();
            let error = merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap_err().to_string();
            for part in ["bad", name, "element 37", &value.to_string()] {
                assert!(error.contains(part), "{part} is not in {error}");
            }
            assert!(!out.exists());
        }
    }
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn values_too_large_for_the_output_stop_the_merge() {
    let folder = tempfile::tempdir().unwrap();
    let (_, models) = Llama::default().family(folder.path(), 2);
    let mut config = config(&format!("dtype = \"float16\"\n{}", linear(&[&models[0], &models[1]])));
    config.method.parameters.normalize = Some(false);
    config.models[0].parameters.weight = Some(1e6.into());
    let out = folder.path().join("out");
    let error = merge(&Plan::new(&config).unwrap(), &out, &MergeOptions::default(), &|_| ()).unwrap_err().to_string();
    assert!(error.contains("cannot be represented in F16") && error.contains("larger range"), "{error}");
    assert!(!out.exists());
}

/// As in the paper, the models have one more row than the base, for `[PAD]`.
#[test]
fn rows_that_not_all_have_follow_the_policy() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    Llama { vocab: 40, tied: false, ..Llama::default() }.write(&dir("base"), 0);
    Llama { vocab: 41, tied: false, ..Llama::default() }.write(&dir("a"), 1);
    Llama { vocab: 43, tied: false, ..Llama::default() }.write(&dir("b"), 2);
    let models = [dir("a"), dir("b")];
    let text =
        |policy: &str, base: &Path| format!("vocabulary = \"{policy}\"\n{}", ties(base, &models, "density = 0.6"));
    let error = problems(&text("error", &dir("base")));
    for name in ["embed_tokens", "lm_head"] {
        assert_problem(&error, &[name, "[40, 16]", "[41, 16]", "[43, 16]", "`vocabulary`", "\"keep\""]);
    }
    let rows = |policy: &str, base: &str| {
        let (_folder, out) = run(&config(&text(policy, &dir(base))));
        assert_eq!(out.config()["vocab_size"], out.info("lm_head.weight").unwrap().shape[0]);
        (out.info("model.embed_tokens.weight").unwrap().shape[0], values(&out))
    };
    let (common, out) = rows("common", "base");
    assert_eq!(common, 40);
    let (base_rows, of_base) = rows("base", "base");
    assert_eq!(base_rows, 40);
    assert!(out == of_base);
    let (all, kept) = rows("keep", "base");
    assert_eq!(all, 43);
    let table =
        |values: &[(String, Vec<f32>)]| values.iter().find(|v| v.0 == "model.embed_tokens.weight").unwrap().1.clone();
    let of = |name: &str| Checkpoint::open(&dir(name)).unwrap().load_f32("model.embed_tokens.weight").unwrap();
    assert_eq!(table(&kept)[..40 * 16], table(&out)[..]);
    let (a, b) = (of("a"), of("b"));
    // Row 40 is in both models; rows 41 and 42 are in only one.
    for (i, value) in table(&kept)[40 * 16..41 * 16].iter().enumerate() {
        assert!((value - (a[640 + i] + b[640 + i]) / 2.0).abs() < 1e-3);
    }
    assert_eq!(table(&kept)[41 * 16..], b[41 * 16..]);
    // Without a base, the first model takes its role.
    let first = format!("vocabulary = \"base\"\n{}", linear(&[&dir("b"), &dir("a")]));
    let (_folder, out_of_linear) = run(&config(&first));
    assert_eq!(out_of_linear.info("lm_head.weight").unwrap().shape[0], 43);
    // A base with more rows than the models keeps them.
    let (rows_of_b, out) = {
        let text = format!("vocabulary = \"base\"\n{}", ties(&dir("b"), &[dir("a")], "density = 0.6"));
        let (_folder, out) = run(&config(&text));
        (out.info("model.embed_tokens.weight").unwrap().shape[0], values(&out))
    };
    assert_eq!(rows_of_b, 43);
    assert_eq!(table(&out)[41 * 16..], b[41 * 16..]);
}

#[test]
fn tokenizers_that_disagree_are_an_error_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 2);
    let tokenizer = |tokens: [&str; 3]| {
        json!({"model": {"type": "BPE", "vocab": {tokens[0]: 0, tokens[1]: 1}, "merges": []},
               "added_tokens": [{"id": 2, "content": tokens[2]}]})
        .to_string()
    };
    fs::write(base.join("tokenizer.json"), tokenizer(["a", "b", "<pad>"])).unwrap();
    fs::write(models[0].join("tokenizer.json"), tokenizer(["a", "b", "<pad>"]) + " ").unwrap();
    fs::write(models[1].join("tokenizer.json"), tokenizer(["a", "b", "<eos>"])).unwrap();
    let text = ties(&base, &models, "density = 0.5");
    assert_problem(&problems(&text), &["ft2", "token 2", "<pad>", "<eos>", "ignore_tokenizers"]);
    let plan = Plan::new(&config(&format!("ignore_tokenizers = true\n{text}"))).unwrap();
    assert!(plan.notes.iter().any(|note| note.contains("<eos>")));
    // The output has the base's tokenizer, or the requested one.
    for (source, expected) in [("base", "<pad>"), (models[1].to_str().unwrap(), "<eos>")] {
        let text = format!("ignore_tokenizers = true\ntokenizer_source = {source:?}\n{text}");
        let (folder, _) = run(&config(&text));
        let written = fs::read_to_string(folder.path().join("out/tokenizer.json")).unwrap();
        assert!(written.contains(expected), "{source}: {written}");
    }
    let text = format!("tokenizer_source = \"nobody\"\n{}", ties(&base, &models[..1], ""));
    assert_problem(&problems(&text), &["tokenizer_source `nobody`"]);
}

/// Integer tensors are copied if they agree, and cannot be merged otherwise.
#[test]
fn tensors_of_integers() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, ids: [u8; 4]| {
        let dir = folder.path().join(name);
        let plan = [
            TensorSpec { name: "w".to_owned(), dtype: Dtype::F32, shape: vec![1] },
            TensorSpec { name: "ids".to_owned(), dtype: Dtype::U8, shape: vec![4] },
        ];
        let writer = CheckpointWriter::create(&dir, &plan, WriteOptions::default()).unwrap();
        writer.write("w", &1f32.to_le_bytes()).unwrap();
        writer.write("ids", &ids).unwrap();
        writer.put_json("config.json", &json!({"model_type": "other"})).unwrap();
        writer.finish(Manifest::new("model")).unwrap();
        dir
    };
    let (a, b, c) = (write("a", [1, 2, 3, 4]), write("b", [1, 2, 3, 4]), write("c", [1, 2, 3, 5]));
    let (_folder, out) = run(&config(&linear(&[&a, &b])));
    assert_eq!(out.bytes("ids").unwrap(), [1, 2, 3, 4]);
    assert_problem(&problems(&linear(&[&a, &c])), &["`ids`", "U8", "differs between"]);
}

#[test]
fn slices_are_stacked_and_their_problems_said() {
    let folder = tempfile::tempdir().unwrap();
    let (_, models) = Llama { layers: 3, ..Llama::default() }.family(folder.path(), 2);
    let slice = |model: &Path, from: usize, to: usize| {
        format!(
            "[[slices]]\n[[slices.sources]]\nmodel = {:?}\nlayer_range = [{from}, {to}]\n",
            model.display().to_string()
        )
    };
    let text = format!("method = \"passthrough\"\n{}{}", slice(&models[0], 0, 2), slice(&models[1], 1, 3));
    let plan = Plan::new(&config(&text)).unwrap();
    let folder_out = tempfile::tempdir().unwrap();
    let out = folder_out.path().join("out");
    let summary = merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap();
    assert_eq!(summary.copied, summary.tensors);
    let out = Checkpoint::open(&out).unwrap();
    assert_eq!(out.config()["num_hidden_layers"], 4);
    let of = |model: usize, name: &str| Checkpoint::open(&models[model]).unwrap().bytes(name).unwrap().to_vec();
    let layer = |n: usize| format!("model.layers.{n}.mlp.up_proj.weight");
    for (place, (model, from)) in [(0, 0), (0, 1), (1, 1), (1, 2)].into_iter().enumerate() {
        assert!(out.bytes(&layer(place)).unwrap() == of(model, &layer(from)), "layer {place}");
    }
    assert!(out.bytes("model.embed_tokens.weight").unwrap() == of(0, "model.embed_tokens.weight"));
    assert!(out.bytes("model.norm.weight").unwrap() == of(1, "model.norm.weight"));
    let wrong = format!("method = \"passthrough\"\n{}{}", slice(&models[0], 2, 2), slice(&models[1], 1, 9));
    let found = problems(&wrong);
    assert_problem(&found, &["slice 1", "is empty"]);
    assert_problem(&found, &["slice 2", "layer_range ends at 9", "has only 3 layers"]);
}

/// A stage can refer to an earlier one, and a run reuses the completed stages of an interrupted run.
#[test]
fn stages_build_on_each_other_and_are_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 3);
    let stages = |last: &str| {
        format!(
            "[[stage]]\nname = \"pair\"\nmethod = \"linear\"\n[[stage.models]]\nmodel = {:?}\n[[stage.models]]\nmodel = {:?}\n\
             [[stage]]\nbase_model = {base:?}\n[stage.method.task_arithmetic]\nlambda = {last}\n\
             [[stage.models]]\nmodel = \"pair\"\n[[stage.models]]\nmodel = {:?}\n",
            models[0], models[1], models[2]
        )
    };
    let out = folder.path().join("out");
    let staged = folder.path().join(".out.stages/pair");
    let run = |text: &str, overwrite: bool| {
        let kept = std::sync::Mutex::new(Vec::new());
        let result = run_file(
            &MergeFile::from_toml(text).unwrap(),
            &out,
            &MergeOptions { overwrite, ..MergeOptions::default() },
            &|event| {
                if let cl_merge::Event::Kept(name) = event {
                    kept.lock().unwrap().push(name.to_owned());
                }
            },
        );
        (result, kept.into_inner().unwrap())
    };
    // The second stage fails because the values, multiplied by λ, are outside the range of bf16.
    let (result, _) = run(&stages("1e39"), false);
    assert!(result.is_err() && !out.exists() && staged.exists());
    let (result, kept) = run(&stages("0.5"), false);
    result.unwrap();
    assert_eq!(kept, ["pair"]);
    assert!(out.exists() && !folder.path().join(".out.stages").exists());
    // Running the stages by hand gives the same result.
    let pair = folder.path().join("pair");
    merge(&Plan::new(&config(&linear(&[&models[0], &models[1]]))).unwrap(), &pair, &MergeOptions::default(), &|_| ())
        .unwrap();
    let by_hand = format!(
        "base_model = {base:?}\n[method.task_arithmetic]\nlambda = 0.5\n[[models]]\nmodel = {:?}\n[[models]]\nmodel = {:?}\n",
        pair, models[2]
    );
    let (_folder, expected) = super::run(&config(&by_hand));
    assert!(values(&Checkpoint::open(&out).unwrap()) == values(&expected));
    // The output contains the whole file, which reproduces it.
    let again = MergeFile::read(&out.join("merge_config.toml")).unwrap();
    assert_eq!(again.stages.len(), 2);
    let other = folder.path().join("other");
    run_file(&again, &other, &MergeOptions::default(), &|_| ()).unwrap();
    assert!(values(&Checkpoint::open(&other).unwrap()) == values(&expected));
    // A process that is killed while it removes its stages leaves one of these.
    for left in [&["config.json", "manifest.json"][..], &["manifest.json"], &[]] {
        run(&stages("1e39"), true).0.unwrap_err();
        fs::remove_file(folder.path().join(".out.stages/pair.made-from")).unwrap();
        for file in fs::read_dir(&staged).unwrap().map(|entry| entry.unwrap().path()) {
            if !left.iter().any(|kept| file.ends_with(kept)) {
                fs::remove_file(file).unwrap();
            }
        }
        let (result, kept) = run(&stages("0.5"), true);
        result.unwrap_or_else(|e| panic!("{left:?}: {e}"));
        assert!(kept.is_empty() && out.join("tokenizer.json").exists() == base.join("tokenizer.json").exists());
        assert!(values(&Checkpoint::open(&out).unwrap()) == values(&expected), "{left:?}");
        assert!(!folder.path().join(".out.stages").exists());
    }
    // An existing output is not replaced without `overwrite`.
    assert!(run(&stages("0.5"), false).0.unwrap_err().to_string().contains("exists"));
    // Invalid references between stages.
    let wrong = "[[stage]]\nmethod = \"linear\"\n[[stage.models]]\nmodel = \"later\"\n\
                 [[stage]]\nname = \"later\"\nmethod = \"linear\"\n[[stage.models]]\nmodel = \"x\"\n";
    let error = run(wrong, true).0.unwrap_err().to_string();
    assert!(error.contains("needs a `name`") && error.contains("`later` is a later stage"), "{error}");
}

/// Tensors without elements are merged by every method that merges the others.
#[test]
fn tensors_without_elements_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama { empty: true, ..Llama::default() }.family(folder.path(), 2);
    for method in ["linear", "task_arithmetic", "ties", "dare_ties", "della", "tsv", "opcm", "model_stock"] {
        let models: String = models.iter().map(|model| format!("[[models]]\nmodel = {model:?}\n")).collect();
        let (_folder, merged) = run(&config(&format!("base_model = {base:?}\nmethod = {method:?}\n{models}")));
        assert_eq!(merged.info("model.layers.0.mlp.empty.weight").unwrap().shape, [0, 16], "{method}");
    }
}

/// All problems of a later stage are reported before an earlier stage runs.
#[test]
fn all_stages_are_checked_before_the_first_one_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 2);
    let deep = folder.path().join("deep");
    Llama { layers: 3, ..Llama::default() }.write(&deep, 1);
    let first = format!(
        "[[stage]]\nname = \"pair\"\nmethod = \"linear\"\n[[stage.models]]\nmodel = {:?}\n[[stage.models]]\nmodel = {:?}\n",
        models[0], models[1]
    );
    let model = |stage: &str, model: &Path| format!("{stage}[[stage.models]]\nmodel = {model:?}\n");
    let uses_pair = |method: &str| format!("[[stage]]\nbase_model = \"pair\"\nmethod = \"{method}\"\n");
    let nowhere = folder.path().join("nowhere");
    let out = folder.path().join("out");
    for (last, parts) in [
        (model(&uses_pair("tiess"), &base), vec!["stage result: no method is called `tiess`"]),
        (model(&uses_pair("ties"), &nowhere), vec!["nowhere: not found"]),
        (model(&uses_pair("ties"), &deep), vec!["stage result: ", "deep: `num_hidden_layers` is 3"]),
        (model(&uses_pair("slerp"), &base), vec!["stage result: slerp needs `t`"]),
        (
            // The result of slices has other layers than its sources, so only problems independent of the layers are
            // reported.
            format!(
                "[[stage]]\nname = \"stack\"\nmethod = \"passthrough\"\n[[stage.slices]]\n[[stage.slices.sources]]\n\
                 model = \"pair\"\nlayer_range = [0, 1]\n{}densty = 0.5\n",
                model("[[stage]]\nmethod = \"linear\"\n[[stage.models]]\nmodel = \"stack\"\n", &nowhere)
            ),
            vec!["stage result: ", "nowhere: not found", "no parameter `densty`"],
        ),
    ] {
        let file = MergeFile::from_toml(&format!("{first}{last}")).unwrap();
        let error = run_file(&file, &out, &MergeOptions::default(), &|_| ()).unwrap_err().to_string();
        assert!(error.contains("nothing was written"), "{error}");
        parts.iter().for_each(|part| assert!(error.contains(part), "{part} is not in {error}"));
        assert!(!out.exists() && !folder.path().join(".out.stages").exists());
    }
    // The layers of slices are only known after writing; the message says what is kept.
    let text = format!(
        "[[stage]]\nname = \"stack\"\nmethod = \"passthrough\"\n[[stage.slices]]\n[[stage.slices.sources]]\nmodel = {base:?}\n\
         layer_range = [0, 1]\n{}",
        model("[[stage]]\nmethod = \"linear\"\n[[stage.models]]\nmodel = \"stack\"\n", &base)
    );
    let file = MergeFile::from_toml(&text).unwrap();
    let error = run_file(&file, &out, &MergeOptions::default(), &|_| ()).unwrap_err().to_string();
    for part in ["stage result: ", "the result was not written", ".out.stages", "`num_hidden_layers`"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(!out.exists() && folder.path().join(".out.stages/stack").exists());
}

/// Notes of all stages are reported, each once.
#[test]
fn notes_are_told_by_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let (_, models) = Llama::default().family(folder.path(), 2);
    let stage = |name: &str, other: &str| {
        format!(
            "[[stage]]\nname = \"{name}\"\nmethod = \"linear\"\n[[stage.models]]\nmodel = {:?}\n\
             weight = [{{ filter = \"mpl\", value = 0.5 }}, {{ value = 1.0 }}]\n[[stage.models]]\nmodel = {other}\n",
            models[0]
        )
    };
    let text = format!("{}{}", stage("pair", &format!("{:?}", models[1])), stage("last", "\"pair\""));
    let notes = std::sync::Mutex::new(Vec::new());
    let out = folder.path().join("out");
    run_file(&MergeFile::from_toml(&text).unwrap(), &out, &MergeOptions::default(), &|event| {
        if let cl_merge::Event::Note(note) = event {
            notes.lock().unwrap().push(note.to_owned());
        }
    })
    .unwrap();
    let notes = notes.into_inner().unwrap();
    assert!(
        matches!(&notes[..], [one] if one.contains("the filter \"mpl\" of `weight` matches no tensor")),
        "{notes:?}"
    );
}

#[test]
fn a_budget_that_is_too_small_is_refused_and_an_estimate_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 3);
    let plan = Plan::new(&config(&ties(&base, &models, "density = 0.5"))).unwrap();
    let tight = MergeOptions { memory: 1 << 20, ..MergeOptions::default() };
    let out = folder.path().join("out");
    let error = merge(&plan, &out, &tight, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("1 MiB of memory is not enough") && error.contains("allow"), "{error}");
    assert!(!out.exists());
    let told = estimate(&plan, &MergeOptions::default()).unwrap();
    // Tied embeddings: four models, each with slightly more than 4,000 weights of two bytes.
    let weights: usize = plan.tensors().iter().map(|t| t.shape.iter().product::<usize>()).sum();
    assert_eq!(told.bytes_written, 2 * weights as u64);
    assert_eq!(told.bytes_read, 8 * weights as u64);
    assert!(told.peak_memory < MergeOptions::default().memory && told.measured_on.is_some());
}

/// The metadata of the output suffices to reproduce it.
#[test]
fn the_output_carries_its_settings() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 2);
    let (out_folder, first) = run(&config(&ties(&base, &models, "density = 0.3")));
    let out = out_folder.path().join("out");
    let again = MergeFile::read(&out.join("merge_config.toml")).unwrap();
    let (_folder, second) = run(&again.stages[0]);
    assert!(values(&first) == values(&second));
    let text = fs::read_to_string(out.join("merge_config.toml")).unwrap();
    for part in ["election = \"unweighted\"", "divisor = \"count\"", "trim = \"model\"", "lambda = 1.0", "seed = 42"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\nbase_model:\n") && card.contains("arXiv 2306.01708"), "{card}");
    let manifest = Manifest::read(&out).unwrap();
    assert_eq!(manifest.sources.len(), 3);
    assert_eq!(manifest.sources[0].role, "base");
    assert!(Manifest::verify(&out).unwrap().is_empty());
}
