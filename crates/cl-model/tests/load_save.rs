//! Model directories: invalid ones are rejected with directory and tensor by name, valid ones are loaded and saved bit
//! for bit.

mod common;

use std::path::Path;

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSource, TensorSpec, WriteOptions};
use cl_model::{Decoder, LoadOptions};
use cl_torch::tch::Kind;
use serde_json::{Map, Value, json};

/// The error message for a directory, with and without reading tensors.
fn refusal(dir: &Path) -> String {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let loading = Decoder::load(&checkpoint, LoadOptions::cpu(Kind::Float)).err().expect("refused").to_string();
    let checking = Decoder::check(&checkpoint).expect_err("refused").to_string();
    assert_eq!(loading, checking);
    loading
}

fn qwen3() -> Map<String, Value> {
    common::llama(json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}))
}

#[test]
fn tensors_that_do_not_fit_the_config_are_refused_by_name() {
    type Change = fn(&mut Map<String, Value>);
    type Row = (&'static str, Map<String, Value>, Change, &'static [&'static str]);
    let rows: [Row; 8] = [
        (
            "missing",
            common::llama(json!({})),
            |t| drop(t.remove("model.layers.1.mlp.up_proj.weight")),
            &["missing: [model.layers.1.mlp.up_proj.weight]", "not used: []"],
        ),
        (
            "a layer too many",
            common::llama(json!({})),
            |t| drop(t.insert("model.layers.2.mlp.up_proj.weight".into(), json!([24, 16]))),
            &["missing: []", "not used: [model.layers.2.mlp.up_proj.weight]"],
        ),
        (
            "a bias that the config does not speak of",
            common::llama(json!({})),
            |t| drop(t.insert("model.layers.0.self_attn.q_proj.bias".into(), json!([16]))),
            &["not used: [model.layers.0.self_attn.q_proj.bias]"],
        ),
        (
            "a bias that is not there",
            common::llama(json!({"attention_bias": true})),
            |t| drop(t.remove("model.layers.0.self_attn.k_proj.bias")),
            &["missing: [model.layers.0.self_attn.k_proj.bias]"],
        ),
        (
            "an embedding of another vocabulary",
            common::llama(json!({})),
            |t| drop(t.insert("model.embed_tokens.weight".into(), json!([60, 16]))),
            &["model.embed_tokens.weight", "[61, 16]", "[60, 16]"],
        ),
        (
            "a transposed matrix",
            common::llama(json!({})),
            |t| drop(t.insert("model.layers.0.mlp.down_proj.weight".into(), json!([24, 16]))),
            &["model.layers.0.mlp.down_proj.weight", "[16, 24]", "[24, 16]"],
        ),
        (
            "a head of its own that is not there",
            common::llama(json!({})),
            |t| drop(t.remove("lm_head.weight")),
            &["missing: [lm_head.weight]"],
        ),
        (
            "more than fit on a line",
            qwen3(),
            |t| t.retain(|name, _| !name.contains("layers.1")),
            &["missing: [model.layers.1.input_layernorm.weight, ", "and 6 more"],
        ),
    ];
    for (what, config, change, parts) in rows {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("the-model");
        let mut tensors = common::tensors(&config);
        change(&mut tensors);
        common::write_model(&path, &config, &tensors, Dtype::F32);
        let message = refusal(&path);
        assert!(message.starts_with(&path.display().to_string()), "{what}: {message}");
        assert!(parts.iter().all(|p| message.contains(p)), "{what}: {message}");
    }
}

#[test]
fn configs_that_make_no_model_are_refused_with_key_and_value() {
    let whole = common::llama(json!({}));
    for (changes, parts) in [
        (json!({"architectures": ["GPT2LMHeadModel"]}), ["GPT2LMHeadModel", "supported: LlamaForCausalLM"]),
        (json!({"architectures": ["MambaForCausalLM"]}), ["MambaForCausalLM", "supported"]),
        (json!({"architectures": null}), ["(none named)", "supported"]),
        (json!({"vocab_size": null}), ["config.json", "invalid type: null"]),
        (json!({"num_attention_heads": 0}), ["num_attention_heads = 0", "at least 1"]),
        (json!({"num_key_value_heads": 3}), ["num_attention_heads = 2", "num_key_value_heads = 3"]),
        (json!({"head_dim": 5}), ["head_dim = 5", "even"]),
        (json!({"rms_norm_eps": 0.0}), ["rms_norm_eps = 0", "positive"]),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}), ["factor = 0", "positive"]),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), ["longrope", "expected default, linear or llama3"]),
        (json!({"hidden_act": "relu"}), ["relu", "silu"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("the-model");
        let mut config = whole.clone();
        config.extend(changes.as_object().unwrap().clone());
        common::write_model(&path, &config, &common::tensors(&whole), Dtype::F32);
        let message = refusal(&path);
        assert!(message.starts_with(&path.display().to_string()), "{message}");
        assert!(parts.iter().all(|p| message.contains(p)), "{message}");
    }
}

#[test]
fn whole_numbers_are_no_weights() {
    let config = common::llama(json!({}));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("the-model");
    let name = "model.layers.0.self_attn.q_proj.weight";
    let tensors: Vec<(TensorSpec, Vec<u8>)> = common::tensors(&config)
        .iter()
        .map(|(n, shape)| {
            let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
            let dtype = if n == name { Dtype::I8 } else { Dtype::F32 };
            common::stored(n, &shape, dtype)
        })
        .collect();
    let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.0.clone()).collect();
    let writer = CheckpointWriter::create(&path, &specs, WriteOptions::default()).unwrap();
    tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
    writer.put_json("config.json", &Value::Object(config)).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
    let message = refusal(&path);
    assert!(message.contains("the-model: ") && message.contains(name) && message.contains("I8"), "{message}");
}

#[test]
fn the_head_of_a_tied_model_is_used_only_if_it_differs_from_the_embedding() {
    let config = common::llama(json!({"tie_word_embeddings": true}));
    let bytes = |name: &str, dtype| common::stored(name, &[61, 16], dtype).1;
    let table = "model.embed_tokens.weight";
    let heads = [
        (None, false),
        (Some((Dtype::F32, bytes(table, Dtype::F32))), false),
        // A copy in another dtype is a tensor of its own.
        (Some((Dtype::BF16, bytes(table, Dtype::BF16))), true),
        (Some((Dtype::F32, bytes("lm_head.weight", Dtype::F32))), true),
    ];
    for (head, own) in heads {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        let mut tensors: Vec<(TensorSpec, Vec<u8>)> = common::tensors(&config)
            .iter()
            .map(|(n, shape)| {
                let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
                common::stored(n, &shape, Dtype::F32)
            })
            .collect();
        if let Some((dtype, bytes)) = head {
            tensors.push((common::stored("lm_head.weight", &[61, 16], dtype).0, bytes));
        }
        let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.0.clone()).collect();
        let writer = CheckpointWriter::create(&path, &specs, WriteOptions::default()).unwrap();
        tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
        writer.put_json("config.json", &Value::Object(config.clone())).unwrap();
        writer.finish(Manifest::new("model")).unwrap();
        let model = Decoder::load(&Checkpoint::open(&path).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap();
        assert_eq!(model.linears().any(|l| l.name == "lm_head"), own);
        assert_eq!(model.config.tie_word_embeddings, !own);
    }
}

#[test]
fn what_is_saved_comes_back_bit_by_bit() {
    for config in [
        common::llama(json!({"attention_bias": true, "mlp_bias": true, "dtype": "float32"})),
        common::llama(json!({"tie_word_embeddings": true})),
        qwen3(),
    ] {
        for (kind, dtype, name) in [
            (Kind::Float, Dtype::F32, "float32"),
            (Kind::BFloat16, Dtype::BF16, "bfloat16"),
            (Kind::Half, Dtype::F16, "float16"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let model = common::model(&config, LoadOptions::cpu(kind));
            let out = dir.path().join("out");
            let companions = [("tokenizer.json".to_owned(), b"{}".to_vec())];
            model.save(&out, kind, &config, &companions, Manifest::new("model"), false).unwrap();
            let checkpoint = Checkpoint::open(&out).unwrap();
            assert_eq!(checkpoint.config()["torch_dtype"], name);
            assert_eq!(checkpoint.config().get("dtype"), config.get("dtype").map(|_| json!(name)).as_ref());
            assert_eq!(std::fs::read(out.join("tokenizer.json")).unwrap(), b"{}");
            let again = Decoder::load(&checkpoint, LoadOptions::cpu(kind)).unwrap();
            assert_eq!(again.config, model.config);
            let (before, after) = (model.named_parameters(), again.named_parameters());
            assert_eq!(checkpoint.names().len(), before.len());
            for ((name, a), (other, b)) in before.iter().zip(&after) {
                assert_eq!(name, other);
                assert_eq!(checkpoint.info(name).unwrap().dtype, dtype);
                assert_eq!(a.kind(), b.kind());
                assert_eq!(a, b, "{name}");
            }
            let twice = model.save(&out, kind, &config, &[], Manifest::new("model"), false);
            assert!(twice.unwrap_err().to_string().contains("already exists"));
        }
    }
}

#[test]
fn f32_weights_are_saved_in_half_precision_with_one_rounding() {
    let config = common::llama(json!({}));
    let wide = common::model(&config, LoadOptions::cpu(Kind::Float));
    for kind in [Kind::BFloat16, Kind::Half] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        wide.save(&out, kind, &config, &[], Manifest::new("model"), false).unwrap();
        let again = Decoder::load(&Checkpoint::open(&out).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap();
        for ((name, a), (_, b)) in wide.named_parameters().iter().zip(&again.named_parameters()) {
            assert_eq!(&a.to_kind(kind).to_kind(Kind::Float), b, "{name}");
        }
    }
}
