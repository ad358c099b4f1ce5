//! Tokenization with and without BOS, as in lm-evaluation-harness and Transformers.

use cl_data::Tokenizer;
use serde_json::{Value, json};

fn open(tokenizer: &Value, config: &Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

#[test]
fn ids_are_those_of_the_harness() {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/tokens.json")).unwrap();
    let mut compared = 0;
    for case in fixture["cases"].as_array().unwrap() {
        let tokenizer = open(&case["tokenizer"], &case["config"]);
        for encoded in case["encoded"].as_array().unwrap() {
            let (text, add_bos) = (encoded["text"].as_str().unwrap(), encoded["add_bos"].as_bool());
            let expected: Vec<u32> = serde_json::from_value(encoded["ids"].clone()).unwrap();
            let ids = tokenizer.encode_with(text, add_bos).unwrap();
            assert_eq!(ids, expected, "{}: {text:?}, {add_bos:?}", case["name"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 162);
}

#[test]
fn a_bos_outside_of_the_vocabulary_is_an_error() {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/tokens.json")).unwrap();
    let tokenizer = open(&fixture["cases"][1]["tokenizer"], &json!({"bos_token": "<begin>"}));
    let message = tokenizer.encode_with("the owl", Some(true)).unwrap_err().to_string();
    assert!(message.contains("`<begin>`"), "{message}");
    assert_eq!(tokenizer.encode_with("the owl", Some(false)).unwrap().len(), 2);
}
