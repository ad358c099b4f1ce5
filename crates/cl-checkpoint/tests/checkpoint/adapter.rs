//! Reading and writing PEFT adapter directories; `fixtures/make_peft.py` created `fixtures/peft`.

use std::fs;
use std::path::Path;

use cl_checkpoint::{
    Adapter, AdapterConfig, BaseExperts, Dtype, LayerKind, Manifest, TargetModules, TensorSource, TensorSpec,
    write_adapter, write_adapter_with_files,
};
use serde_json::{Value, json};

use super::{assert_error, names, safetensors, spec};

const MODULE: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn what_peft_writes_is_read_with_its_ranks_and_scalings() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
    let expected: Value = serde_json::from_slice(&fs::read(fixtures.join("expected.json")).unwrap()).unwrap();
    let cases = expected.as_object().unwrap();
    assert_eq!(cases.len(), 3);
    for (case, modules) in cases {
        let adapter = Adapter::open(&fixtures.join(case)).unwrap();
        let modules = modules.as_object().unwrap();
        assert_eq!(adapter.modules().len(), modules.len(), "{case}");
        for module in adapter.modules() {
            let (name, expected) = (&module.name, &modules[&module.name]);
            let rank = adapter.config().rank(name);
            assert_eq!(Some(rank as u64), expected["rank"].as_u64(), "{case} {name}");
            assert_eq!((module.a_shape[0], module.b_shape[1]), (rank, rank), "{case} {name}");
            // Both divide the same f64 values.
            assert_eq!(Some(adapter.config().scaling(name)), expected["scaling"].as_f64(), "{case} {name}");
            let tensor = format!("base_model.model.{name}.lora_A.weight");
            assert_eq!(adapter.bytes(&tensor).unwrap().len(), rank * module.a_shape[1] * 4);
        }
    }
}

#[test]
fn what_is_read_and_written_again_is_the_same() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft");
    let folder = tempfile::tempdir().unwrap();
    for case in ["plain", "rslora", "patterns"] {
        let (from, to) = (fixtures.join(case), folder.path().join(case));
        let adapter = Adapter::open(&from).unwrap();
        let tensor = |name: &str| {
            let info = adapter.info(name).unwrap();
            (spec(name, info.dtype, &info.shape), adapter.bytes(name).unwrap().to_vec())
        };
        let tensors: Vec<(TensorSpec, Vec<u8>)> = adapter.names().into_iter().map(tensor).collect();
        write_adapter(&to, adapter.config(), &tensors, Manifest::new("adapter"), false).unwrap();
        assert_eq!(names(&to), ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]);

        let again = Adapter::open(&to).unwrap();
        assert_eq!(again.config(), adapter.config());
        assert_eq!(again.modules(), adapter.modules());
        for (spec, bytes) in &tensors {
            assert_eq!(again.bytes(&spec.name).unwrap(), bytes);
        }
        let json = |dir: &Path| -> Value {
            serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (before, after) = (json(&from), json(&to));
        for (key, value) in before.as_object().unwrap() {
            let same = match (value.as_f64(), after[key].as_f64()) {
                (Some(a), Some(b)) => a == b, // 6 may be written as 6.0
                _ if key == "alpha_pattern" => {
                    value.as_object().unwrap().len() == after[key].as_object().unwrap().len()
                }
                _ => *value == after[key],
            };
            assert!(same, "{case}: {key} was {value}, is {}", after[key]);
        }
        let order = |v: &Value| v["rank_pattern"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(order(&before), order(&after), "the first match counts, so order matters");
    }
}

#[test]
fn an_adapter_that_contradicts_its_config_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let tensors = |r: usize| -> Vec<(TensorSpec, Vec<u8>)> {
        let tensor = |factor: &str, shape: &[usize]| {
            let name = format!("base_model.model.{MODULE}.lora_{factor}.weight");
            (spec(&name, Dtype::F32, shape), vec![0; shape[0] * shape[1] * 4])
        };
        vec![tensor("A", &[r, 3]), tensor("B", &[5, r])]
    };
    let config = AdapterConfig { r: 2, ..AdapterConfig::default() };
    let rank = write_adapter(&dir, &config, &tensors(3), Manifest::new("adapter"), false);
    assert_error("another rank", rank, &["adapter_model.safetensors", MODULE, "implies rank 2"]);
    let half = write_adapter(&dir, &config, &tensors(2)[..1], Manifest::new("adapter"), false);
    assert_error("half", half, &["adapter_model.safetensors", "lora_A.weight", "no counterpart"]);
    let zero =
        write_adapter(&dir, &AdapterConfig { r: 0, ..config.clone() }, &tensors(0), Manifest::new("adapter"), false);
    assert_error("rank 0", zero, &["adapter_config.json", "r = 0"]);
    assert!(names(folder.path()).is_empty());
    write_adapter(&dir, &config, &tensors(2), Manifest::new("adapter"), false).unwrap();
    assert_eq!(Adapter::open(&dir).unwrap().modules()[0].b_shape, [5, 2]);
}

pub(super) type Tensors<'t> = &'t [(&'t str, &'t [usize])];

/// Writes a directory with this config, and one zero byte for each element of the tensors.
pub(super) fn adapter(dir: &Path, config: &str, tensors: Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), config).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let size: usize = shape.iter().product();
        header.insert((*name).to_owned(), json!({"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}));
        end += size;
    }
    let bytes = safetensors(serde_json::to_vec(&header).unwrap(), &vec![0; end]);
    fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let (config, weights) = ("adapter_config.json", "adapter_model.safetensors");
    let good: Tensors = &[(A, &[2, 3]), (B, &[5, 2])];
    let lora = |more: &str| format!(r#"{{"peft_type":"LORA","r":2{more}}}"#);
    let rows: Vec<(&str, String, Tensors, Vec<&str>)> = vec![
        (
            "rank of the config",
            r#"{"r":4}"#.to_owned(),
            good,
            vec![weights, MODULE, "implies rank 4", "[2, 3]", "[5, 2]"],
        ),
        ("rank of B", lora(""), &[(A, &[2, 3]), (B, &[5, 3])], vec![weights, MODULE, "[5, 3]"]),
        ("rank of a pattern", lora(r#","rank_pattern":{"q_proj":1}"#), good, vec![weights, MODULE, "implies rank 1"]),
        ("four dimensions", lora(""), &[(A, &[2, 3, 1, 1]), (B, &[5, 2])], vec![weights, MODULE, "[2, 3, 1, 1]"]),
        ("A without B", lora(""), &[(A, &[2, 3])], vec![weights, A, "no counterpart"]),
        ("B without A", lora(""), &[(B, &[5, 2])], vec![weights, B, "no counterpart"]),
        (
            "no prefix",
            lora(""),
            &[("q.lora_A.weight", &[2, 3]), ("q.lora_B.weight", &[5, 2])],
            vec![weights, "q.lora_A.weight"],
        ),
        ("nothing of LoRA", lora(""), &[("base_model.model.q.weight", &[2])], vec![weights, "no lora_A and lora_B"]),
        ("rank 0", r#"{"r":0}"#.to_owned(), good, vec![config, "r = 0"]),
        (
            "rank 0 in a pattern",
            lora(r#","rank_pattern":{"q_proj":0}"#),
            good,
            vec![config, "q_proj", "rank of at least 1"],
        ),
        ("negative rank", r#"{"r":-1}"#.to_owned(), good, vec![config, "-1"]),
        (
            "a pattern that is no expression",
            lora(r#","rank_pattern":{"q_proj(":3}"#),
            good,
            vec![config, "rank_pattern", "q_proj("],
        ),
        (
            "a pattern that looks ahead",
            lora(r#","alpha_pattern":{"(?!k)q_proj":3}"#),
            good,
            vec![config, "alpha_pattern", "(?!k)q_proj"],
        ),
        ("a pattern twice", lora(r#","alpha_pattern":{"q":3,"q":4}"#), good, vec![config, "`q` appears twice"]),
        ("a key twice", r#"{"r":2,"r":3}"#.to_owned(), good, vec![config, "duplicate field `r`"]),
        ("not JSON", "r: 2".to_owned(), good, vec![config, "not valid JSON"]),
        ("a list", "[]".to_owned(), good, vec![config]),
    ];
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    for (case, text, tensors, parts) in rows {
        adapter(&dir, &text, tensors);
        assert_error(case, Adapter::open(&dir), &parts);
    }
    adapter(&dir, &lora(r#","rank_pattern":null,"alpha_pattern":null"#), good);
    assert_eq!(Adapter::open(&dir).unwrap().config().rank(MODULE), 2);
}

#[test]
fn what_a_directory_lacks_is_said() {
    let folder = tempfile::tempdir().unwrap();
    assert_error("nothing", Adapter::open(folder.path()), &["adapter_config.json: not found"]);
    fs::write(folder.path().join("adapter_config.json"), "{}").unwrap();
    assert_error("no weights", Adapter::open(folder.path()), &["adapter_model.safetensors: not found"]);
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    assert_error("pickle only", Adapter::open(folder.path()), &["adapter_model.safetensors", "adapter_model.bin"]);
    fs::write(folder.path().join("adapter_model.safetensors"), [0; 20]).unwrap();
    assert_error("zeros", Adapter::open(folder.path()), &["adapter_model.safetensors", "not valid JSON"]);
}

#[test]
fn target_modules_are_a_list_or_a_pattern() {
    let read = |text: &str| serde_json::from_str::<AdapterConfig>(text).unwrap().target_modules;
    assert_eq!(read(r#"{"target_modules":"all-linear"}"#), Some(TargetModules::Pattern("all-linear".to_owned())));
    assert_eq!(read(r#"{"target_modules":["q_proj"]}"#), Some(TargetModules::List(vec!["q_proj".to_owned()])));
    assert_eq!(read(r#"{"target_modules":null}"#), None);
}

#[test]
fn adapters_of_another_kind_open_without_modules() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    adapter(&dir, r#"{"peft_type":"IA3"}"#, &[("base_model.model.q.ia3_l", &[2])]);
    let adapter = Adapter::open(&dir).unwrap();
    assert!(adapter.modules().is_empty());
    assert_eq!(adapter.names(), ["base_model.model.q.ia3_l"]);
}

const TABLE: &str = "base_model.model.model.embed_tokens";

/// For an embedding, PEFT uses other names, and factors whose product is the transposed update of the table.
#[test]
fn embeddings_have_factors_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let [a, b, whole] =
        ["lora_embedding_A", "lora_embedding_B", "base_layer.weight"].map(|suffix| format!("{TABLE}.{suffix}"));
    adapter(&dir, r#"{"peft_type":"LORA","r":2}"#, &[(&a, &[2, 7]), (&b, &[3, 2]), (&whole, &[7, 3])]);
    let opened = Adapter::open(&dir).unwrap();
    let [module] = opened.modules()[..] else { panic!("one module") };
    assert_eq!((module.name.as_str(), module.kind, module.rank()), ("model.embed_tokens", LayerKind::Embedding, 2));
    assert_eq!((module.weight_shape(), module.factors()), ([7, 3], [a.clone(), b.clone()]));
    assert_eq!(opened.whole_tensors(), [(whole.as_str(), "model.embed_tokens.weight".to_owned())]);
    assert!(opened.magnitude(module).is_none());
    adapter(&dir, r#"{"peft_type":"LORA","r":2}"#, &[(&a, &[2, 7])]);
    assert_error("half an embedding", Adapter::open(&dir), &["lora_embedding_A", "no counterpart"]);
    adapter(&dir, r#"{"peft_type":"LORA","r":3}"#, &[(&a, &[2, 7]), (&b, &[3, 2])]);
    assert_error("rank of an embedding", Adapter::open(&dir), &["model.embed_tokens", "implies rank 3"]);
}

/// DoRA magnitudes, with both names that PEFT has used.
#[test]
fn magnitudes_belong_to_use_dora() {
    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let dora = r#"{"peft_type":"LORA","r":2,"use_dora":true}"#;
    for suffix in ["lora_magnitude_vector", "lora_magnitude_vector.weight"] {
        let magnitude = format!("base_model.model.{MODULE}.{suffix}");
        adapter(&dir, dora, &[(A, &[2, 3]), (B, &[5, 2]), (&magnitude, &[5])]);
        let opened = Adapter::open(&dir).unwrap();
        let [module] = opened.modules()[..] else { panic!("one module") };
        assert!(module.dora && opened.whole_tensors().is_empty());
        assert_eq!(opened.magnitude(module), Some(magnitude.clone()));
        adapter(&dir, dora, &[(A, &[2, 3]), (B, &[5, 2]), (&magnitude, &[4])]);
        assert_error("short", Adapter::open(&dir), &[MODULE, "a magnitude of 5 values", "[4]"]);
        let plain = r#"{"peft_type":"LORA","r":2}"#;
        adapter(&dir, plain, &[(A, &[2, 3]), (B, &[5, 2]), (&magnitude, &[5])]);
        assert_error("not asked for", Adapter::open(&dir), &[MODULE, "use_dora is not set"]);
    }
    adapter(&dir, dora, &[(A, &[2, 3]), (B, &[5, 2])]);
    assert_error("missing", Adapter::open(&dir), &[MODULE, "no magnitude vector"]);
}

#[test]
fn features_that_are_not_known_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let good: Tensors = &[("base_model.model.q.lora_A.weight", &[2, 3]), ("base_model.model.q.lora_B.weight", &[5, 2])];
    for (more, feature) in [
        ("", None),
        (r#","use_dora":false,"lora_bias":false,"layer_replication":null,"arrow_config":{}"#, None),
        (r#","bias":"all","lora_bias":true,"modules_to_save":["lm_head"]"#, None),
        (r#","fan_in_fan_out":true"#, Some("fan_in_fan_out")),
        (r#","target_parameters":[]"#, None),
        (r#","layer_replication":[[0,2]]"#, Some("layer_replication")),
        (r#","init_lora_weights":"pissa_niter_4""#, Some("pissa")),
    ] {
        adapter(&dir, &format!(r#"{{"peft_type":"LORA","r":2{more}}}"#), good);
        let checked = Adapter::open(&dir).unwrap().check_built();
        match feature {
            None => checked.unwrap(),
            Some(feature) => assert_error(more, checked, &["adapter", feature, "not supported"]),
        }
    }
}

const PREFIX: &str = "base_model.model.";

/// Names and keys as written by PEFT 0.21.
#[test]
fn what_is_trained_beside_factors_is_told() {
    use cl_checkpoint::BesideKind::{Bias, Rows, Saved, Untrained, UpdateBias};
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let [a, b] = ["A", "B"].map(|factor| format!("{PREFIX}{MODULE}.lora_{factor}.weight"));
    let of = |more: &str, tensors: &[(&str, &[usize])]| {
        let names: Vec<String> = tensors.iter().map(|(name, _)| format!("{PREFIX}{name}")).collect();
        let mut all: Vec<(&str, &[usize])> = vec![(&a, &[2, 3]), (&b, &[5, 2])];
        all.extend(names.iter().zip(tensors).map(|(name, (_, shape))| (name.as_str(), *shape)));
        adapter(&dir, &format!(r#"{{"peft_type":"LORA","r":2{more}}}"#), &all);
        Adapter::open(&dir).unwrap().beside()
    };
    let kinds = |more: &str, tensors: &[(&str, &[usize])]| -> Vec<_> {
        of(more, tensors).unwrap().into_iter().map(|t| (t.tensor, t.kind)).collect()
    };
    let one = |tensor: &str, kind| vec![(tensor.to_owned(), kind)];
    let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
    assert_eq!(kinds("", &[("lm_head.base_layer.weight", &[4, 3])]), one(head, Untrained));
    assert_eq!(kinds(r#","modules_to_save":["embed_tokens"]"#, &[(table, &[4, 3])]), one(table, Saved));
    let tied = r#","modules_to_save":["model.embed_tokens"],"ensure_weight_tying":true"#;
    assert!(kinds(tied, &[(table, &[4, 3]), (head, &[4, 3])]).iter().all(|(_, kind)| *kind == Saved));
    let bias = format!("{MODULE}.base_layer.bias");
    assert_eq!(kinds(r#","bias":"lora_only""#, &[(&bias, &[5])]), one(&format!("{MODULE}.bias"), Bias));
    let own = format!("{MODULE}.lora_B.bias");
    let module = MODULE.to_owned();
    assert_eq!(kinds(r#","lora_bias":true"#, &[(&own, &[5])]), one(&format!("{MODULE}.bias"), UpdateBias { module }));
    let rows = "model.embed_tokens.token_adapter.trainable_tokens_delta";
    let of_head = "lm_head.token_adapter.trainable_tokens_delta";
    assert_eq!(kinds(r#","trainable_token_indices":[7,3]"#, &[(rows, &[2, 3])]), one(table, Rows(vec![7, 3])));
    let both = r#","trainable_token_indices":{"embed_tokens":[7,3],"lm_head":[9]}"#;
    let expected = [one(head, Rows(vec![9])), one(table, Rows(vec![7, 3]))].concat();
    assert_eq!(kinds(both, &[(rows, &[2, 3]), (of_head, &[1, 3])]), expected);
    // Additional config, additional tensors, and what the message must contain.
    type Case<'a> = (&'a str, &'a [(&'a str, &'a [usize])], &'a str);
    let wrong: [Case; 5] = [
        (r#","modules_to_save":["embed_tokens","lm_head"]"#, &[(table, &[4, 3])], "modules_to_save (`lm_head`)"),
        (r#","trainable_token_indices":[7,3]"#, &[(rows, &[3, 3])], "2 different ids"),
        (r#","trainable_token_indices":[7,7]"#, &[(rows, &[2, 3])], "1 different ids"),
        (r#","lora_bias":true"#, &[], "lora_bias names trained tensors"),
        ("", &[(&own, &[5])], "expected lora_bias = true"),
    ];
    for (more, tensors, message) in wrong {
        assert_error(more, of(more, tensors), &["adapter", message]);
    }
}

/// A model card is next to the adapter, and listed in the manifest like all files.
#[test]
fn more_files_are_written_with_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let tensors: Vec<(TensorSpec, Vec<u8>)> = [("A", [2, 3]), ("B", [5, 2])]
        .map(|(factor, shape)| {
            let name = format!("base_model.model.{MODULE}.lora_{factor}.weight");
            (spec(&name, Dtype::F32, &shape), vec![0; shape[0] * shape[1] * 4])
        })
        .into();
    let config = AdapterConfig { r: 2, ..AdapterConfig::default() };
    let write = |name: &str| {
        let files: [(&str, &[u8]); 1] = [(name, b"# An adapter")];
        write_adapter_with_files(
            &dir,
            &config,
            &tensors,
            &files,
            &BaseExperts::default(),
            Manifest::new("adapter"),
            false,
        )
    };
    assert_error("outside", write("../README.md"), &["not the name of a file"]);
    assert!(names(folder.path()).is_empty());
    write("README.md").unwrap();
    assert_eq!(names(&dir), ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]);
    assert!(Manifest::verify(&dir).unwrap().is_empty());
}
