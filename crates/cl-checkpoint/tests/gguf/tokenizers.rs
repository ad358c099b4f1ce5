//! Token ids from the written `tokenizer.json`, compared with those of the published rules and of SentencePiece.

use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use super::writer::{Gguf, Value, strings};
use super::{fixture, import_bytes, json};

/// Returns a model with this vocabulary and pre-tokenizer.
fn model(case: &Json, pre: &str) -> Gguf {
    let types: Vec<i32> = serde_json::from_value(case["types"].clone()).unwrap();
    let mut keys = vec![
        ("model", Value::Text(case["model"].as_str().unwrap().to_owned())),
        ("pre", Value::Text(pre.to_owned())),
        ("tokens", strings(&case["tokens"])),
        ("bos_token_id", Value::U32(case["bos"].as_u64().unwrap() as u32)),
    ];
    let tokens = types.len() as u64;
    keys.push(("token_type", Value::Ints(types)));
    if let Some(merges) = case.get("merges") {
        keys.push(("merges", strings(merges)));
    }
    if let Some(scores) = case.get("scores") {
        keys.push(("scores", Value::Floats(serde_json::from_value(scores.clone()).unwrap())));
    }
    if let Some(prefix) = case.get("prefix") {
        keys.push(("add_space_prefix", Value::Bool(prefix.as_bool().unwrap())));
    }
    Gguf::llama(&keys, tokens)
}

fn tokenizer(file: &Gguf) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    import_bytes(folder.path(), &file.bytes()).unwrap();
    Tokenizer::from_file(folder.path().join("out/tokenizer.json")).unwrap()
}

/// Checks the ids of every text, with and without BOS, and decoding.
fn assert_ids(name: &str, file: &Gguf, fixture: &Json, case: &Json) {
    let tokenizer = tokenizer(file);
    let texts: Vec<&str> = fixture["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert!(texts.len() >= 60 && texts.contains(&""));
    for (i, text) in texts.into_iter().enumerate() {
        let expected: Vec<u32> = serde_json::from_value(case["ids"][i].clone()).unwrap();
        let plain = tokenizer.encode(text, false).unwrap();
        assert_eq!(plain.get_ids(), expected, "{name}: {text:?} is {:?}", plain.get_tokens());
        let bos = case["adds_bos"].as_bool().unwrap().then(|| case["bos"].as_u64().unwrap() as u32);
        let with_bos: Vec<u32> = bos.into_iter().chain(expected.iter().copied()).collect();
        assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), with_bos, "{name}: {text:?}");
        if let Some(decoded) = case["decoded"][i].as_str() {
            assert_eq!(tokenizer.decode(&expected, false).unwrap(), decoded, "{name}: {text:?}");
        }
    }
}

#[test]
fn ids_of_every_pre_tokenizer_are_those_of_its_published_rule() {
    let fixture = json(&fixture("tokenizers.json"));
    let mut pres = 0;
    for name in ["gpt2", "smollm", "llama3", "qwen2"] {
        let case = &fixture["cases"][name];
        for pre in case["pres"].as_array().unwrap() {
            let pre = pre.as_str().unwrap();
            assert_ids(pre, &model(case, pre), &fixture, case);
            pres += 1;
        }
    }
    assert_eq!(pres, 8);
}

#[test]
fn ids_of_sentencepiece_vocabularies_are_those_of_sentencepiece() {
    let fixture = json(&fixture("tokenizers.json"));
    for name in ["sentencepiece", "sentencepiece_no_prefix"] {
        let case = &fixture["cases"][name];
        let mut file = model(case, "default");
        assert_ids(name, &file, &fixture, case);
        // Some files list the merges in addition to the scores.
        file.set("tokenizer.ggml.merges", strings(&case["listed_merges"]));
        assert_ids(&format!("{name} with merges"), &file, &fixture, case);
        // Older files have no `pre`, and rely on SentencePiece's default ids.
        file.remove("tokenizer.ggml.merges");
        file.remove("tokenizer.ggml.pre");
        file.remove("tokenizer.ggml.bos_token_id");
        assert_ids(&format!("{name} without keys"), &file, &fixture, case);
    }
}

#[test]
fn keys_say_which_tokens_are_added_around_a_text() {
    let fixture = json(&fixture("tokenizers.json"));
    let case = &fixture["cases"]["smollm"];
    let mut file = model(case, "smollm");
    file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    let ids = |file: &Gguf| tokenizer(file).encode("a", true).unwrap().get_ids().to_vec();
    let plain = ids(&file);
    assert_eq!(plain.len(), 1);
    file.set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    assert_eq!(ids(&file), [plain[0], 2]);
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    assert_eq!(ids(&file), [0, plain[0], 2]);

    let mut file = model(&fixture["cases"]["llama3"], "llama-bpe");
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    assert_eq!(ids(&file).len(), 1);
}

fn written(folder: &Path, name: &str) -> Json {
    json(&folder.join("out").join(name))
}

#[test]
fn companions_name_the_special_tokens() {
    let mut file = Gguf::tiny();
    file.set("tokenizer.ggml.bos_token_id", Value::U32(0));
    file.set("tokenizer.ggml.eot_token_id", Value::U32(2));
    file.set("tokenizer.ggml.padding_token_id", Value::U32(u32::MAX)); // llama.cpp's value for "none"
    file.set("tokenizer.chat_template", Value::Text("{{ messages }}".to_owned()));
    let folder = tempfile::tempdir().unwrap();
    let report = import_bytes(folder.path(), &file.bytes()).unwrap();
    assert_eq!((report.model_type, report.tokens, report.notes.len()), ("llama", 4, 0));
    assert_eq!(written(folder.path(), "special_tokens_map.json"), json!({"bos_token": "a", "eos_token": "<eos>"}));
    assert_eq!(written(folder.path(), "generation_config.json"), json!({"bos_token_id": 0, "eos_token_id": [3, 2]}));
    let config = written(folder.path(), "tokenizer_config.json");
    assert_eq!((&config["eos_token"], &config["model_max_length"]), (&json!("<eos>"), &json!(32)));
    assert_eq!((&config["chat_template"], &config["add_bos_token"]), (&json!("{{ messages }}"), &json!(false)));
    let model = written(folder.path(), "config.json");
    assert_eq!((&model["eos_token_id"], &model["pad_token_id"]), (&json!(3), &Json::Null));
}

#[test]
fn a_missing_pre_tokenizer_is_noted() {
    let mut file = Gguf::tiny();
    file.remove("tokenizer.ggml.pre");
    let folder = tempfile::tempdir().unwrap();
    let report = import_bytes(folder.path(), &file.bytes()).unwrap();
    assert!(report.notes.len() == 1 && report.notes[0].contains("tokenizer.ggml.pre"), "{:?}", report.notes);
    assert!(fs::exists(folder.path().join("out/manifest.json")).unwrap());
}
