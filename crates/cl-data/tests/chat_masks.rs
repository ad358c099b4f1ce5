//! Tokens of a conversation that the loss covers, compared with the assistant masks of Transformers'
//! `apply_chat_template`. `fixtures/make_chat_masks.py` generated the expected values.

use std::collections::BTreeMap;

use cl_data::{ChatTemplate, Encoding, Example, Message, Profile, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Fixture {
    tokens: BTreeMap<String, String>,
    templates: BTreeMap<String, String>,
    conversations: Vec<Vec<Message>>,
    tokenizer: Value,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: usize,
    input_ids: Vec<u32>,
    /// Positions of the assistant's tokens.
    learned: Vec<usize>,
}

#[test]
fn the_loss_covers_what_transformers_marks() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/chat_masks.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), fixture.tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), json!(fixture.tokens).to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    let tokens: Vec<_> = fixture.tokens.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    for case in &fixture.cases {
        let template = ChatTemplate::new(&fixture.templates[&case.template], &tokens).unwrap();
        let messages = fixture.conversations[case.conversation].clone();
        let chat = Some(&template);
        let encoding = Encoding { tokenizer: &tokenizer, chat, max_length: None, profile: Profile::Method };
        let encoded = encoding.example(&Example::chat(messages)).unwrap();
        let place = format!("{}, conversation {}", case.template, case.conversation);
        assert_eq!(encoded.input_ids, case.input_ids, "{place}");
        let learned: Vec<usize> = encoded.learned.into_iter().flatten().collect();
        assert_eq!(learned, case.learned, "{place}");
    }
    assert_eq!(fixture.cases.len(), 36);
}
