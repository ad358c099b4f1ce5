//! Faults: outputs in the wrong place, inputs that change during a merge, invalid values and settings, excessive ranges,
//! and stop requests.

use std::fs;
use std::path::Path;

use cl_checkpoint::{Checkpoint, Interrupt, TensorSource};
use cl_merge::adapter::truncated_svd;
use cl_merge::methods::{
    ConsensusMerging, Divisor, IsoCts, Linear, MultiSlerp, Rescale, SettingsError, Sparsify, TaskVectors,
};
use cl_merge::{
    Error, MergeFile, MergeMethod, MergeOptions, Plan, TensorGroup, Values, check_output, merge, merge_tensor, run_file,
};

use super::models::Llama;

fn linear(models: &[&Path]) -> String {
    let models: String = models.iter().map(|m| format!("[[models]]\nmodel = {m:?}\n")).collect();
    format!("method = \"linear\"\n{models}")
}

fn file(text: &str) -> MergeFile {
    MergeFile::from_toml(text).unwrap()
}

#[test]
fn an_output_never_takes_the_place_of_an_input_or_of_what_is_not_ours() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().join("models");
    let (_, tuned) = Llama::default().family(&models, 2);
    let file = file(&linear(&[&tuned[0], &tuned[1]]));
    let overwrite = MergeOptions { overwrite: true, ..MergeOptions::default() };
    let thesis = folder.path().join("thesis");
    fs::create_dir(&thesis).unwrap();
    fs::write(thesis.join("thesis.txt"), "years").unwrap();
    fs::write(folder.path().join("note"), "mine").unwrap();
    let here = std::env::current_dir().unwrap();
    for (out, why) in [
        (tuned[0].clone(), "is a model to be merged"),
        (models.clone(), "contains a model to be merged"),
        (tuned[1].join("merged"), "lies inside a model to be merged"),
        (here.clone(), "is the working directory"),
        (here.parent().unwrap().to_owned(), "contains the working directory"),
        (thesis.clone(), "contains neither a manifest.json"),
        (folder.path().join("note"), "is a file"),
        (folder.path().join("note/merged"), "note: is not a directory"),
    ] {
        for error in [check_output(&file, &out, true).err(), run_file(&file, &out, &overwrite, &|_| ()).err()] {
            let message = error.unwrap().to_string();
            assert!(message.contains(why), "{}: {message}", out.display());
        }
    }
    assert_eq!(fs::read_to_string(thesis.join("thesis.txt")).unwrap(), "years");
    let out = folder.path().join("out");
    for _ in 0..2 {
        run_file(&file, &out, &overwrite, &|_| ()).unwrap();
    }
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let message = run_file(&file, &out, &overwrite, &|_| ()).unwrap_err().to_string();
    assert!(message.contains("`notes.txt`, which was not written by this program"), "{message}");
}

#[test]
fn an_input_that_changes_while_it_is_merged_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let (_, tuned) = Llama::default().family(folder.path(), 2);
    let plan = Plan::new(&file(&linear(&[&tuned[0], &tuned[1]])).stages[0]).unwrap();
    let weights = tuned[1].join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let changed = std::sync::Once::new();
    let out = folder.path().join("out");
    let error = merge(&plan, &out, &MergeOptions::default(), &|_| {
        // The file is rewritten in place with the same bytes; the merge must fail, because it cannot know that the
        // content is unchanged.
        changed.call_once(|| {
            let mut file = fs::OpenOptions::new().write(true).open(&weights).unwrap();
            std::io::Write::write_all(&mut file, &bytes).unwrap();
        });
    })
    .unwrap_err();
    let Error::Checkpoint(cl_checkpoint::Error::Changed { path }) = &error else { panic!("{error}") };
    assert_eq!(*path, weights);
    assert!(!out.exists());
}

#[test]
fn a_stage_is_made_again_when_anything_that_it_copies_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let (base, tuned) = Llama::default().family(folder.path(), 2);
    let out = folder.path().join("out");
    let text = |lambda: &str| {
        format!(
            "[[stage]]\nname = \"pair\"\nmethod = \"linear\"\n[[stage.models]]\nmodel = {:?}\n[[stage.models]]\nmodel = {:?}\n\
             [[stage]]\nbase_model = {base:?}\n[stage.method.task_arithmetic]\nlambda = {lambda}\n[[stage.models]]\n\
             model = \"pair\"\n",
            tuned[0], tuned[1]
        )
    };
    let kept = |lambda: &str| {
        let kept = std::sync::atomic::AtomicBool::new(false);
        let result = run_file(&file(&text(lambda)), &out, &MergeOptions::default(), &|event| {
            if matches!(event, cl_merge::Event::Kept(_)) {
                kept.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
        (result.is_ok(), kept.into_inner())
    };
    let stop = "1e39"; // the second stage fails, the first one stands
    assert_eq!(kept(stop), (false, false));
    assert_eq!(kept(stop), (false, true));
    for (name, content) in
        [("config.json", None), ("tokenizer.json", Some("{}")), ("generation_config.json", Some("{}"))]
    {
        let path = tuned[0].join(name);
        let text = content.map_or_else(
            || fs::read_to_string(&path).unwrap().replacen('{', "{\"rope_theta\": 5e5, ", 1),
            str::to_owned,
        );
        fs::write(&path, text).unwrap();
        assert_eq!(kept(stop), (false, false), "{name}");
        assert_eq!(kept(stop), (false, true), "{name}");
    }
    fs::write(folder.path().join(".out.stages/notes.txt"), "mine").unwrap();
    assert_eq!(kept("0.5"), (true, true));
    assert!(folder.path().join(".out.stages/notes.txt").exists(), "not ours");
}

#[test]
fn nan_is_refused_also_where_tensors_are_copied_unless_it_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m");
    Llama::default().write_with(
        &model,
        1,
        |name, i, value| {
            if name.ends_with("up_proj.weight") && i == 7 { f32::NAN } else { value }
        },
    );
    let text = format!("method = \"passthrough\"\n[[models]]\nmodel = {model:?}\n");
    let plan = Plan::new(&file(&text).stages[0]).unwrap();
    let out = folder.path().join("out");
    let message = merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap_err().to_string();
    for part in ["up_proj.weight", "element 7 is NaN", "--allow-non-finite"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!out.exists());
    let allow = MergeOptions { allow_non_finite: true, ..MergeOptions::default() };
    merge(&plan, &out, &allow, &|_| ()).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let bytes = |dir: &Path| Checkpoint::open(dir).unwrap().bytes(name).unwrap().to_vec();
    assert!(bytes(&out) == bytes(&model));
}

#[test]
fn ranges_beyond_any_model_are_a_problem_and_not_a_loop() {
    let folder = tempfile::tempdir().unwrap();
    let (base, _) = Llama::default().family(folder.path(), 0);
    for end in ["4000000000", "9223372036854775807"] {
        let text = format!(
            "method = \"passthrough\"\n[[slices]]\n[[slices.sources]]\nmodel = {base:?}\nlayer_range = [0, {end}]\n"
        );
        let error = Plan::new(&file(&text).stages[0]).err().unwrap().to_string();
        assert!(error.contains("has only 2 layers") && error.lines().count() == 2, "{error}");
    }
    let yaml = format!(
        "merge_method: passthrough\nslices:\n  - sources:\n      - model: {}\n        layer_range: [0, 18446744073709551615]\n",
        base.display()
    );
    let path = folder.path().join("m.yaml");
    fs::write(&path, yaml).unwrap();
    let error = Plan::new(&MergeFile::read(&path).unwrap().stages[0]).err().unwrap().to_string();
    assert!(error.contains("has only 2 layers"), "{error}");
}

/// No number in a merge file alone determines a size or a number of repetitions.
#[test]
fn numbers_without_measure_are_bounded() {
    use cl_merge::adapter::{CombineOptions, ExtractOptions, combine, extract};
    let folder = tempfile::tempdir().unwrap();
    let (base, tuned) = Llama { hidden: 72, layers: 1, ..Llama::default() }.family(folder.path(), 2);
    let text = linear(&[&tuned[0], &tuned[1]]);
    let endless =
        text.replace("method = \"linear\"\n", "[method.karcher]\nmax_iter = 1000000000000000000\ntol = 0.0\n");
    let message = planned(&endless).err().unwrap();
    assert!(message.contains("`max_iter` is 1000000000000000000; it must be between 0 and 1000000"), "{message}");
    let out = folder.path().join("adapter");
    let options = ExtractOptions { rank: usize::MAX, threads: usize::MAX, ..ExtractOptions::default() };
    let report = extract(&base, &tuned[0], &out, &options).unwrap();
    assert_eq!(report.total.rank, 72);
    let options = CombineOptions {
        method: "magmax".to_owned(),
        rank: Some(usize::MAX),
        memory: usize::MAX,
        ..CombineOptions::default()
    };
    combine(&[out.clone(), out], &folder.path().join("both"), &options).unwrap();
    let options =
        MergeOptions { memory: usize::MAX, threads: usize::MAX, max_shard_size: 0, ..MergeOptions::default() };
    let plan = planned(&text).unwrap();
    merge(&plan, &folder.path().join("merged"), &options, &|_| ()).unwrap();
}

#[test]
fn a_merge_that_is_asked_to_stop_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (_, tuned) = Llama::default().family(folder.path(), 2);
    let interrupt = Interrupt::default();
    let options = MergeOptions { interrupt: interrupt.clone(), ..MergeOptions::default() };
    let error = run_file(&file(&linear(&[&tuned[0], &tuned[1]])), &folder.path().join("out"), &options, &|event| {
        if matches!(event, cl_merge::Event::Written(_)) {
            interrupt.request();
        }
    })
    .unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["base", "ft1", "ft2"]);
}

#[test]
fn buffers_do_not_count_and_other_extras_have_a_policy() {
    let folder = tempfile::tempdir().unwrap();
    let (_, tuned) = Llama::default().family(folder.path(), 2);
    // The first model, with rotary frequencies as stored by Llama 2 and one additional tensor.
    let with = |name: &str, more: &[&str]| {
        let (from, dir) = (Checkpoint::open(&tuned[0]).unwrap(), folder.path().join(name));
        let spec = |name: &str| cl_checkpoint::TensorSpec {
            name: name.to_owned(),
            dtype: from.info(name).map_or(cl_checkpoint::Dtype::BF16, |i| i.dtype),
            shape: from.info(name).map_or(vec![4], |i| i.shape.clone()),
        };
        let specs: Vec<_> = from.names().into_iter().chain(more.iter().copied()).map(spec).collect();
        let writer = cl_checkpoint::CheckpointWriter::create(&dir, &specs, Default::default()).unwrap();
        for spec in &specs {
            writer.write(&spec.name, from.bytes(&spec.name).unwrap_or(&[0x80, 0x3f].repeat(4))).unwrap();
        }
        writer.put_json("config.json", &serde_json::Value::Object(from.config().clone())).unwrap();
        writer.finish(cl_checkpoint::Manifest::new("model")).unwrap();
        dir
    };
    let old = with("old", &["model.layers.0.self_attn.rotary_emb.inv_freq"]);
    let plan = Plan::new(&file(&linear(&[&old, &tuned[1]])).stages[0]).unwrap();
    assert!(plan.notes.iter().any(|n| n.contains("1 buffers")), "{:?}", plan.notes);
    assert!(plan.tensors().iter().all(|t| !t.name.contains("inv_freq")));

    let own = with("own", &["model.vision.weight"]);
    let text = linear(&[&tuned[1], &own]);
    let message = Plan::new(&file(&text).stages[0]).err().unwrap().to_string();
    assert!(
        message.contains("`model.vision.weight`") && message.contains("set `extra_tensors` to \"base\""),
        "{message}"
    );
    let names = |policy: &str| {
        let plan = Plan::new(&file(&format!("extra_tensors = \"{policy}\"\n{text}")).stages[0]).unwrap();
        let out = folder.path().join(format!("with-{policy}"));
        merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap();
        let merged = Checkpoint::open(&out).unwrap();
        merged.info("model.vision.weight").is_some()
    };
    assert!(!names("base") && names("union"));
}

/// Writes a copy of a model with other names, dtypes and tensors.
fn rewritten(
    from: &Path,
    to: &Path,
    rename: impl Fn(&str) -> Option<String>,
    dtype: cl_checkpoint::Dtype,
    more: &[&str],
) {
    use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, TensorSpec, convert};
    let source = Checkpoint::open(from).unwrap();
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    for name in source.names() {
        let Some(new) = rename(name) else { continue };
        let (info, values) = (source.info(name).unwrap(), source.load_f32(name).unwrap());
        let bytes = match dtype {
            // Signs, and magnitudes from one to slightly less than two, so that values can be distinguished.
            Dtype::F8_E4M3 => {
                values.iter().map(|v| if *v < 0.0 { 0xb8 } else { 0x38 } + (v.abs() * 70.0) as u8 % 8).collect()
            }
            Dtype::I8 => values.iter().map(|v| (v * 100.0) as i8 as u8).collect(),
            other => convert::from_f32(other, &values).unwrap(),
        };
        tensors.push((TensorSpec { name: new, dtype, shape: info.shape.clone() }, bytes));
    }
    for name in more {
        tensors.push((TensorSpec { name: (*name).to_owned(), dtype: Dtype::F32, shape: vec![1] }, vec![0; 4]));
    }
    let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.0.clone()).collect();
    let writer = CheckpointWriter::create(to, &specs, Default::default()).unwrap();
    tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
    writer.put_json("config.json", &serde_json::Value::Object(source.config().clone())).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
}

fn planned(text: &str) -> Result<Plan, String> {
    Plan::new(&file(text).stages[0]).map_err(|e| e.to_string())
}

#[test]
fn weights_of_the_bare_model_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (_, tuned) = Llama { tied: false, ..Llama::default() }.family(folder.path(), 2);
    let bare = folder.path().join("bare");
    let strip = |name: &str| name.strip_prefix("model.").map(str::to_owned);
    rewritten(&tuned[1], &bare, strip, cl_checkpoint::Dtype::BF16, &[]);
    for models in [[tuned[0].as_path(), &bare], [&bare, tuned[0].as_path()]] {
        let message = planned(&linear(&models)).err().unwrap();
        assert!(
            message.contains("was saved without its output head: its tensor names do not start with `model.`"),
            "{message}"
        );
        assert_eq!(message.lines().count(), 2, "{message}");
    }
}

#[test]
fn types_that_are_no_numbers_are_told_once_and_eight_bits_are_read() {
    use cl_checkpoint::{Dtype, convert};
    let folder = tempfile::tempdir().unwrap();
    let (base, tuned) = Llama::default().family(folder.path(), 2);
    let as_dtype = |name: &str, from: &Path, dtype, more: &[&str]| {
        let dir = folder.path().join(name);
        rewritten(from, &dir, |name| Some(name.to_owned()), dtype, more);
        dir
    };
    let integers = as_dtype("i8", &tuned[0], Dtype::I8, &[]);
    let message = planned(&linear(&[&tuned[1], &integers])).err().unwrap();
    assert!(message.contains("20 tensors (`model.embed_tokens.weight`, …): I8 in"), "{message}");
    assert_eq!(message.lines().count(), 2, "{message}");

    let eight = [1, 2].map(|i| as_dtype(&format!("f8-{i}"), &tuned[i - 1], Dtype::F8_E4M3, &[]));
    let text = format!("base_model = {base:?}\n{}", linear(&[&eight[0], &eight[1]]));
    let plan = planned(&text).unwrap();
    assert!(plan.notes.iter().any(|note| note.contains("eight bits")), "{:?}", plan.notes);
    let plan = planned(&linear(&[&eight[0], &eight[1]])).unwrap();
    let out = folder.path().join("out");
    merge(&plan, &out, &MergeOptions::default(), &|_| ()).unwrap();
    let (merged, name) = (Checkpoint::open(&out).unwrap(), "model.norm.weight");
    assert_eq!(merged.info(name).unwrap().dtype, Dtype::BF16);
    let stored = eight.each_ref().map(|dir| Checkpoint::open(dir).unwrap().bytes(name).unwrap().to_vec());
    let [x, y] = stored.map(|bytes| convert::f8_to_f32(Dtype::F8_E4M3, &bytes).unwrap());
    assert!(x != y);
    for ((m, x), y) in merged.load_f32(name).unwrap().iter().zip(x).zip(y) {
        assert_eq!(*m, (x + y) / 2.0);
    }
    // Copies keep the dtype of the input.
    let plan = planned(&format!("method = \"passthrough\"\n[[models]]\nmodel = {:?}\n", eight[0])).unwrap();
    assert!(plan.tensors().iter().all(|t| t.dtype == Dtype::F8_E4M3));

    let scaled = as_dtype("scaled", &tuned[0], Dtype::F8_E4M3, &["model.norm.weight_scale_inv"]);
    let message = planned(&linear(&[&scaled, &tuned[1]])).err().unwrap();
    assert!(message.contains("quantized with separate scales such as `model.norm.weight_scale_inv`"), "{message}");
}

/// `{:#}` of anyhow prints an error with all of its causes.
#[test]
fn no_message_contains_that_of_its_cause() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        MergeFile::read(&path).unwrap_err()
    };
    let problems = |text: &str| match Plan::new(&file(text).stages[0]) {
        Err(Error::Problems(problems)) => problems,
        other => panic!("{:?}", other.err()),
    };
    let broken = folder.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::write(broken.join("config.json"), "{").unwrap();
    let wrong_type = || Box::new(toml::from_str::<toml::Table>("a = ").unwrap_err());
    let io = |kind: std::io::ErrorKind| Error::Io { path: "out".into(), source: kind.into() };
    let mut errors: Vec<Box<dyn std::error::Error>> = vec![
        MergeFile::read(&folder.path().join("nowhere")).unwrap_err().into(),
        read("a.toml", "method = 3").into(),
        read("a.yaml", "merge_method: [").into(),
        read("a", "merge_method: linear").into(),
        read("b.yaml", "merge_method: linear\ntokenizer: {tokens: {<a>: {source: {kind: one}}}}\n").into(),
        io(std::io::ErrorKind::NotFound).into(),
        io(std::io::ErrorKind::Interrupted).into(),
        SettingsError::Unreadable(wrong_type()).into(),
        SettingsError::Varying { parameter: "t".to_owned(), source: wrong_type() }.into(),
    ];
    for text in [linear(&[&broken, Path::new("nowhere")]), "[method.ties]\ndensity = 2\ndensty = 1".to_owned()] {
        errors.extend(problems(&text).into_iter().map(Box::from));
    }
    assert!(errors.len() > 12, "{errors:?}");
    for error in errors {
        let mut error: &dyn std::error::Error = &*error;
        while let Some(cause) = error.source() {
            assert!(!error.to_string().contains(&cause.to_string()), "{error:?}");
            error = cause;
        }
    }
}

/// Values and settings of a Rust program that do not fit the tensor are errors, not panics or silent truncation.
#[test]
fn values_and_settings_that_do_not_fit_are_errors() {
    let two = |a: &'static [f32], b: &'static [f32]| vec![Values::from_slice("a", a), Values::from_slice("b", b)];
    let base = Values::from_slice("base", &[0.0; 4]);
    let linear = Linear { weights: vec![1.0; 2], normalize: true };
    let wrong: [(Option<Values<'_>>, _, &str); 4] = [
        (None, two(&[1.0; 4], &[1.0; 3]), "b: tensor `w`: 3 values, but its shape has 4"),
        (None, two(&[1.0; 5], &[1.0; 4]), "a: tensor `w`: 5 values, but its shape has 4"),
        (Some(Values::from_slice("base", &[])), two(&[1.0; 4], &[1.0; 4]), "base: tensor `w`: 0 values"),
        (Some(base.skip(5)), two(&[1.0; 4], &[1.0; 4]), "base: tensor `w`: 0 values, but its shape has 4"),
    ];
    for (base, models, message) in wrong {
        let group = TensorGroup::new("w", &[4], base, models);
        let error = merge_tensor(&linear, &group).unwrap_err();
        assert!(matches!(error, Error::ValueCount { .. }) && error.to_string().contains(message), "{error}");
        let loaded: Vec<_> = group.base.iter().chain(&group.models).map(|values| group.load(values)).collect();
        assert_eq!(loaded.iter().filter(|values| values.is_err()).count(), 1);
    }
    assert!(truncated_svd(&[1.0; 5], [2, 3], 1, "w").is_err_and(|e| e.to_string().contains("tensor `w`: 5 values")));

    let folder = tempfile::tempdir().unwrap();
    let (dir, _) = Llama::default().family(folder.path(), 0);
    let model = Checkpoint::open(&dir).unwrap();
    let shape = model.info("model.norm.weight").unwrap().shape.clone();
    let integers = Values::from_source("a", &model, "model.norm.weight", cl_checkpoint::Dtype::I32);
    let error = TensorGroup::new("w", &shape, None, vec![integers]).load(&integers).unwrap_err();
    assert!(matches!(error, Error::NotFloat { .. }), "{error}");

    let task_vectors = |weights: usize, sparsify: Sparsify| TaskVectors {
        weights: vec![1.0; weights],
        lambda: 1.0,
        sparsify,
        rescale: Rescale::None,
        consensus: None,
        divisor: Divisor::None,
        seed: 0,
    };
    let of = |n: usize| vec![0.5; n];
    let consensus = ConsensusMerging { lambda: 1.0, tall_lambda: of(1), min_agree: 2, only: None };
    let methods: Vec<(Box<dyn MergeMethod>, &str)> = vec![
        (Box::new(Linear { weights: vec![1.0], normalize: false }), "1 values of `weights` for 2 models"),
        (Box::new(MultiSlerp { weights: of(3), normalize_weights: true, eps: 1e-8 }), "3 values of `weights`"),
        (Box::new(consensus), "`tall_lambda`"),
        (Box::new(task_vectors(3, Sparsify::None)), "`weights`"),
        (Box::new(task_vectors(2, Sparsify::Magnitude { density: of(1) })), "`density`"),
        (Box::new(task_vectors(2, Sparsify::Random { density: of(3) })), "`density`"),
        (Box::new(task_vectors(2, Sparsify::Outliers { density: of(2), gamma: of(1) })), "`gamma`"),
        (Box::new(task_vectors(2, Sparsify::Ranked { density: of(2), epsilon: of(3) })), "`epsilon`"),
    ];
    for (method, message) in methods {
        let group = TensorGroup::new("w", &[4], Some(base), two(&[1.0; 4], &[2.0; 4]));
        let error = merge_tensor(&*method, &group).unwrap_err();
        assert!(matches!(error, Error::Undefined { .. }) && error.to_string().contains(message), "{error}");
    }
    let without_base = TensorGroup::new("w", &[4], None, two(&[1.0; 4], &[2.0; 4]));
    assert!(merge_tensor(&task_vectors(2, Sparsify::None), &without_base).is_err());
    let without_models = TensorGroup::new("w", &[2, 2], Some(base), Vec::new());
    assert!(merge_tensor(&IsoCts { lambda: 1.0, common_share: 0.8 }, &without_models).is_err());
}
