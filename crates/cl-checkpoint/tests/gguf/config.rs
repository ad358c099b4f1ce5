//! Metadata that the fixtures do not cover: RoPE scaling, biases, padding of the vocabulary.

use cl_checkpoint::{Checkpoint, TensorSource};
use serde_json::{Value as Json, json};

use super::writer::{Gguf, Value};
use super::{assert_refused, import_bytes};

fn imported(file: &Gguf) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    import_bytes(folder.path(), &file.bytes()).unwrap();
    let model = Checkpoint::open(&folder.path().join("out")).unwrap();
    (folder, model)
}

#[test]
fn rope_scaling_is_carried_over() {
    let text = |t: &str| Value::Text(t.to_owned());
    let (kind, factor) = ("rope.scaling.type", "rope.scaling.factor");
    let rows = [
        (vec![], Json::Null),
        (vec![(kind, text("none")), (factor, Value::F32(4.0))], Json::Null),
        (vec![(kind, text("linear")), (factor, Value::F32(4.0))], json!({"rope_type": "linear", "factor": 4.0})),
        (vec![("rope.scale_linear", Value::F32(2.0))], json!({"rope_type": "linear", "factor": 2.0})),
        (
            vec![
                (kind, text("yarn")),
                (factor, Value::F32(4.0)),
                ("rope.scaling.original_context_length", Value::U32(8)),
            ],
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}),
        ),
    ];
    for (keys, expected) in rows {
        let mut file = Gguf::tiny();
        for (key, value) in keys {
            file.set(&format!("llama.{key}"), value);
        }
        assert_eq!(imported(&file).1.config()["rope_scaling"], expected);
    }
}

#[test]
fn factors_of_one_are_no_scaling_and_others_have_to_follow_the_rule() {
    let mut file = Gguf::tiny();
    file.add("rope_freqs.weight", &[2], [1.0, 1.0].into_iter());
    let (_folder, model) = imported(&file);
    assert_eq!(model.config()["rope_scaling"], Json::Null);
    assert!(model.info("rope_freqs.weight").is_none());

    let folder = tempfile::tempdir().unwrap();
    for (factors, part) in [([3.0, 1.0], "not the factors of a Llama 3"), ([f32::NAN, 1.0], "NaN"), ([1.0, 0.5], "0.5")]
    {
        let mut file = Gguf::tiny();
        file.add("rope_freqs.weight", &[2], factors.into_iter());
        assert_refused(part, folder.path(), &file.bytes(), &["`rope_freqs.weight`", part]);
    }
    // Equal factors would follow from any length below the first wavelength, but not from a length of 0.
    let mut file = Gguf::tiny();
    file.add("rope_freqs.weight", &[2], [2.0, 2.0].into_iter());
    file.set("llama.rope.scaling.original_context_length", Value::U32(0));
    assert_refused("length 0", folder.path(), &file.bytes(), &["`rope_freqs.weight`", "not the factors of a Llama 3"]);
}

#[test]
fn rows_of_query_and_key_go_back_from_pairs_to_halves_with_their_biases() {
    let mut file = Gguf::tiny();
    for (name, rows) in [("attn_q", 8), ("attn_k", 4), ("attn_v", 4), ("attn_output", 8)] {
        file.add(&format!("blk.0.{name}.bias"), &[rows], (0..).map(|i| i as f32));
    }
    let (_folder, model) = imported(&file);
    assert_eq!((&model.config()["attention_bias"], &model.config()["mlp_bias"]), (&json!(true), &json!(false)));
    let load = |name: &str| model.load_f32(&format!("model.layers.0.self_attn.{name}")).unwrap();
    // With heads of width 4, the file has their dimensions in the order 0 2 1 3.
    let query = [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
    assert_eq!(load("q_proj.bias"), query);
    assert_eq!(load("k_proj.bias"), query[..4]);
    assert_eq!(load("v_proj.bias"), [0.0, 1.0, 2.0, 3.0]);
    // Weights are (row · 8 + column) / 8.
    let rows: Vec<f32> = load("q_proj.weight").chunks(8).map(|row| row[0]).collect();
    assert_eq!(rows, query);
    assert_eq!(load("o_proj.weight"), (0..64).map(|i| i as f32 / 8.0).collect::<Vec<_>>());
}

#[test]
fn a_vocabulary_padded_in_the_embedding_is_kept_whole() {
    let mut file = Gguf::tiny();
    for name in ["token_embd.weight", "output.weight"] {
        let tensor = file.tensor(name);
        tensor.shape[0] = 6;
        tensor.data.resize(6 * 8 * 4, 0);
    }
    let (_folder, model) = imported(&file);
    assert_eq!(model.config()["vocab_size"], 6);
    assert_eq!(model.info("lm_head.weight").unwrap().shape, [6, 8]);
}

#[test]
fn without_output_weights_the_embedding_is_tied() {
    let mut file = Gguf::tiny();
    file.remove_tensor("output.weight");
    let (_folder, model) = imported(&file);
    assert_eq!(model.config()["tie_word_embeddings"], true);
    assert!(model.info("lm_head.weight").is_none());
}

#[test]
fn a_window_as_long_as_the_context_is_none() {
    let mut file = Gguf::tiny();
    file.set("llama.attention.sliding_window", Value::U32(32));
    assert_eq!(imported(&file).1.config()["model_type"], "llama");
    file.set("llama.attention.sliding_window", Value::U32(31));
    let (_folder, model) = imported(&file);
    assert_eq!((&model.config()["model_type"], &model.config()["sliding_window"]), (&json!("mistral"), &json!(31)));
}

#[test]
fn files_of_version_2_are_read() {
    let file = Gguf { version: 2, ..Gguf::tiny() };
    assert_eq!(imported(&file).1.names().len(), 12);
}
