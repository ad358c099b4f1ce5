//! Adapters of fused experts; `fixtures/make_target_parameters.py` created `fixtures/target_parameters`.

use std::path::{Path, PathBuf};

use cl_checkpoint::{
    Adapter, AdapterConfig, Manifest, SafetensorsFile, TargetModules, TensorSource, TensorSpec, convert, write_adapter,
    write_adapter_with_files,
};

use super::adapter::{Tensors, adapter};
use super::{assert_error, spec};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/target_parameters").join(name)
}

/// Checks an adapter's updates of a base of zeros against the weights after PEFT's merge, as Transformers saved them.
fn assert_updates(adapter: &Adapter, expected: &SafetensorsFile) {
    let values = |source: &dyn TensorSource, name: &str| {
        convert::to_f32(source.info(name).unwrap().dtype, source.bytes(name).unwrap()).unwrap()
    };
    let names: Vec<String> = adapter.modules().iter().map(|module| format!("{}.weight", module.name)).collect();
    assert_eq!(names, expected.names());
    for module in adapter.modules() {
        let name = format!("{}.weight", module.name);
        assert_eq!(module.weight_shape()[..], expected.info(&name).unwrap().shape);
        let [a, b] = module.factors().map(|factor| values(adapter, &factor));
        let scaling = adapter.config().scaling(&module.name);
        let (rank, [_, columns]) = (module.rank(), module.weight_shape());
        for (i, &merged) in values(expected, &name).iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let product = |k: usize| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column]);
            let update = scaling * (0..rank).map(product).sum::<f64>();
            // PEFT multiplies and adds in f32.
            assert!((update - f64::from(merged)).abs() < 2e-6, "{name}: {update} {merged}");
        }
    }
}

#[test]
fn fused_experts_change_the_weights_that_peft_merges() {
    for (name, modules) in [("mixtral", 22), ("qwen2_moe", 15)] {
        let opened = Adapter::open(&fixture(name)).unwrap();
        assert_eq!(opened.modules().len(), modules);
        assert_updates(&opened, &SafetensorsFile::open(&fixture(name).join("expected.safetensors")).unwrap());
    }
}

/// A written copy has the experts' modules, and targets exactly them.
#[test]
fn a_copy_is_an_ordinary_adapter() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen2_moe"] {
        let opened = Adapter::open(&fixture(name)).unwrap();
        let (_, tensors) = content(&opened);
        let to = folder.path().join(name);
        write_adapter(&to, opened.config(), &tensors, Manifest::new("adapter"), false).unwrap();
        let copy = Adapter::open(&to).unwrap();
        assert_eq!((copy.config(), copy.modules()), (opened.config(), opened.modules()));
        assert_updates(&copy, &SafetensorsFile::open(&fixture(name).join("expected.safetensors")).unwrap());
        let text = std::fs::read_to_string(to.join("adapter_config.json")).unwrap();
        assert!(!text.contains("target_parameters"), "{text}");
        let Some(TargetModules::List(targets)) = &copy.config().target_modules else { panic!("a list") };
        let targeted = |name: &str| targets.iter().any(|t| name == t || name.ends_with(&format!(".{t}")));
        let all = copy.modules();
        assert!(all.iter().all(|module| targeted(&module.name)), "{targets:?}");
        let not = ["model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.mlp.experts.0.down_proj"];
        assert!(!not.iter().any(|name| targeted(name)), "{targets:?}");
    }
}

/// The tensors of an adapter, with its configuration.
fn content(adapter: &Adapter) -> (AdapterConfig, Vec<(TensorSpec, Vec<u8>)>) {
    let tensor = |name: &str| {
        let info = adapter.info(name).unwrap();
        (spec(name, info.dtype, &info.shape), adapter.bytes(name).unwrap().to_vec())
    };
    (adapter.config().clone(), adapter.names().into_iter().map(tensor).collect())
}

/// PEFT's conversion of an adapter that it reads correctly has the same factors as the file of an adapter that it would
/// misread.
#[test]
fn fused_factors_are_those_of_pefts_conversion() {
    let folder = tempfile::tempdir().unwrap();
    let (config, tensors) = content(&Adapter::open(&fixture("per_expert")).unwrap());
    let base = (0..2).map(|layer| (format!("model.layers.{layer}.block_sparse_moe.experts"), 3)).collect();
    for (name, use_rslora) in [("plain", false), ("rslora", true)] {
        let to = folder.path().join(name);
        let config = AdapterConfig { use_rslora, ..config.clone() };
        write_adapter_with_files(&to, &config, &tensors, &[], &base, Manifest::new("adapter"), false).unwrap();
        let file = SafetensorsFile::open(&to.join("adapter_model.safetensors")).unwrap();
        let expected = fixture("per_expert").join(if use_rslora { "expected" } else { "adapter_model" });
        let expected = SafetensorsFile::open(&expected.with_extension("safetensors")).unwrap();
        assert_eq!(file.names(), expected.names());
        for name in file.names() {
            assert_eq!(file.info(name), expected.info(name));
            assert!(file.bytes(name).unwrap() == expected.bytes(name).unwrap(), "{name}");
        }
        let copy = content(&Adapter::open(&to).unwrap());
        assert!(copy.1 == tensors, "the modules are read as they were");
        assert_eq!((copy.0.scaling("w1"), copy.0.rank("w1")), (config.scaling("w1"), 2));
    }
}

/// PEFT's adapters are the same after they have been read as modules and written for fused experts.
#[test]
fn adapters_that_are_fused_again_have_the_same_updates() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen2_moe"] {
        let opened = Adapter::open(&fixture(name)).unwrap();
        let (config, tensors) = content(&opened);
        let to = folder.path().join(name);
        let experts = opened.experts();
        write_adapter_with_files(&to, &config, &tensors, &[], &experts, Manifest::new("adapter"), false).unwrap();
        let text = std::fs::read_to_string(to.join("adapter_config.json")).unwrap();
        assert!(text.contains("target_parameters"), "{text}");
        let copy = Adapter::open(&to).unwrap();
        assert_eq!((copy.modules(), copy.experts()), (opened.modules(), experts));
        assert_updates(&copy, &SafetensorsFile::open(&fixture(name).join("expected.safetensors")).unwrap());
    }
}

#[test]
fn parameters_that_cannot_be_expanded_are_refused_by_name() {
    const M: &str = "base_model.model.model.layers.0.mlp.experts";
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let named = |module: &str| ["A", "B"].map(|factor| format!("{module}.lora_{factor}.weight"));
    let ([a, b], [inner_a, inner_b]) = (named(M), named(&format!("{M}.base_layer")));
    let [other_a, other_b] = named("base_model.model.model.layers.0.feed_forward.experts");
    let [gate_a, gate_b] = named("base_model.model.model.layers.0.mlp.gate");
    let one: Tensors = &[(&a, &[6, 4]), (&b, &[8, 6])];
    let both: Tensors = &[(&inner_a, &[6, 4]), (&inner_b, &[6, 6]), (&a, &[6, 3]), (&b, &[4, 6])];
    let up = r#"["mlp.experts.gate_up_proj"]"#;
    let all = r#"["experts.gate_up_proj","experts.down_proj"]"#;
    let rows: [(&str, &str, &str, Tensors, &[&str]); 13] = [
        ("not a list", "", r#""experts.down_proj""#, one, &["experts.down_proj", "not a list"]),
        ("another name", "", r#"["experts.w"]"#, one, &["`experts.w`", "another parameter", "gate_up_proj"]),
        ("a bias", "", r#"["mlp.experts.gate_up_proj_bias"]"#, one, &["`mlp.experts.gate_up_proj_bias`"]),
        ("another module", "", r#"["feed_forward.experts.down_proj"]"#, one, &["`feed_forward.experts.down_proj`"]),
        (
            "another module of the same end",
            "",
            r#"["experts.down_proj"]"#,
            &[(&other_a, &[6, 4]), (&other_b, &[8, 6])],
            &["`model.layers.0.feed_forward.experts.down_proj`", "another parameter"],
        ),
        ("a transposed family", r#","base_model_name_or_path":"openai/gpt-oss-20b""#, up, one, &["transposed"]),
        (
            "no factors",
            "",
            r#"["mlp.experts.gate_up_proj","mlp.gate.weight"]"#,
            one,
            &["`mlp.gate.weight`", "no factors"],
        ),
        ("too few levels", "", all, one, &["experts.down_proj`", "nested factors"]),
        ("too many levels", "", up, both, &["experts.gate_up_proj`", "nested factors"]),
        ("rank", r#","r":4"#, up, one, &["experts.gate_up_proj`", "rank 4", "[6, 4]", "[8, 6]", "[E·4, in]"]),
        ("odd rows", "", up, &[(&a, &[6, 4]), (&b, &[7, 6])], &["experts.gate_up_proj`", "[7, 6]", "even out"]),
        (
            "a weight of three dimensions",
            "",
            r#"["mlp.gate.weight"]"#,
            &[(&gate_a, &[6, 4]), (&gate_b, &[8, 6])],
            &["mlp.gate.weight`", "E = 1"],
        ),
        (
            "widths",
            "",
            all,
            &[(&inner_a, &[6, 4]), (&inner_b, &[6, 6]), (&a, &[6, 3]), (&b, &[5, 6])],
            &["experts.down_proj`", "does not fit"],
        ),
    ];
    for (case, more, parameters, tensors, parts) in rows {
        let rank = if more.contains(r#""r""#) { "" } else { r#","r":2"# };
        let config = format!(r#"{{"peft_type":"LORA","target_parameters":{parameters}{rank}{more}}}"#);
        adapter(&dir, &config, tensors);
        assert_error(case, Adapter::open(&dir), &[&["adapter_config.json: target_parameters", "PEFT"], parts].concat());
    }
    adapter(&dir, &format!(r#"{{"r":2,"target_parameters":{all}}}"#), both);
    assert_eq!(Adapter::open(&dir).unwrap().modules().len(), 9);
    adapter(&dir, &format!(r#"{{"r":2,"target_parameters":{up}}}"#), &one[..1]);
    assert_error("half", Adapter::open(&dir), &["lora_A.weight", "no counterpart"]);
}

/// The factors of experts are combined only after their sizes have been checked.
#[test]
fn factors_of_the_wrong_size_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let (config, tensors) = content(&Adapter::open(&fixture("per_expert")).unwrap());
    let config = AdapterConfig { use_rslora: true, ..config };
    let base = (0..2).map(|layer| (format!("model.layers.{layer}.block_sparse_moe.experts"), 3)).collect();
    let spoilt = |i: usize, spoil: fn(&mut (TensorSpec, Vec<u8>))| {
        let mut tensors = tensors.clone();
        spoil(&mut tensors[i]);
        write_adapter_with_files(
            &folder.path().join("out"),
            &config,
            &tensors,
            &[],
            &base,
            Manifest::new("adapter"),
            false,
        )
    };
    for i in [0, 1, tensors.len() - 1] {
        let name = &tensors[i].0.name;
        assert_error("short", spoilt(i, |(_, bytes)| bytes.truncate(4)), &[name, "got 4"]);
        assert_error("long", spoilt(i, |(_, bytes)| bytes.push(0)), &[name, "planned"]);
        assert_error("too large", spoilt(i, |(spec, _)| spec.shape[0] = usize::MAX), &[name, "too large"]);
    }
    let twice = spoilt(0, |(spec, _)| spec.name = spec.name.replace("lora_A", "lora_B"));
    assert_error("twice", twice, &["planned twice"]);
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
}
