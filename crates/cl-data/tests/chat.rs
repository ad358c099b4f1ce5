//! Chat templates compared with Transformers' `apply_chat_template`, and where a model directory stores them.

use std::collections::BTreeMap;
use std::path::Path;

use cl_data::{ChatTemplate, Error, Message};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    tokens: BTreeMap<String, String>,
    templates: BTreeMap<String, String>,
    conversations: Vec<Vec<Message>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: usize,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn renders_what_transformers_renders() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/chat.json")).unwrap();
    let tokens: Vec<_> = fixture.tokens.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let (mut texts, mut errors) = (0, 0);
    for case in &fixture.cases {
        let template = ChatTemplate::new(&fixture.templates[&case.template], &tokens).unwrap();
        let got = template.render(&fixture.conversations[case.conversation], case.add_generation_prompt);
        let place = format!("{}, conversation {}", case.template, case.conversation);
        match (&case.text, got) {
            (Some(expected), got) => {
                assert_eq!(&got.unwrap_or_else(|e| panic!("{place}: {e}")), expected, "{place}");
                texts += 1;
            }
            (None, got) => {
                let message = got.expect_err(&place).to_string();
                // The engines word their own errors differently; only a template's own message must be reported.
                let own = case.error.as_deref().filter(|_| !["undefined", "sealed"].contains(&case.template.as_str()));
                assert!(message.contains(own.unwrap_or_default()), "{place}: {message}");
                errors += 1;
            }
        }
    }
    assert!(texts > 150 && errors > 40, "{texts} texts, {errors} errors");
}

fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn hello(path: &Path) -> String {
    let template = ChatTemplate::from_dir(path).unwrap().unwrap();
    template.render(&[Message::new("user", "hello")], false).unwrap()
}

#[test]
fn where_the_template_stands() {
    let list = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
    let map = r#"{"bos_token": {"content": "<b>"}, "eos_token": "<other>"}"#;
    let text = r#"{"chat_template": "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}", "eos_token": "<e>"}"#;
    assert_eq!(hello(dir(&[("tokenizer_config.json", list)]).path()), "d");
    let both = dir(&[("tokenizer_config.json", text), ("special_tokens_map.json", map)]);
    assert_eq!(hello(both.path()), "<b><e>hello");
    let file = dir(&[("tokenizer_config.json", text), ("chat_template.jinja", "file {{ eos_token }}")]);
    assert_eq!(hello(file.path()), "file <e>");
    for config in ["{}", r#"{"chat_template": null}"#] {
        assert!(ChatTemplate::from_dir(dir(&[("tokenizer_config.json", config)]).path()).unwrap().is_none());
    }
    assert!(ChatTemplate::from_dir(dir(&[]).path()).unwrap().is_none());
}

#[test]
fn errors_say_which_file() {
    let configs = [
        (r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#, "only [rag]"),
        (r#"{"chat_template": 3}"#, "neither a string nor a list"),
        (r#"{"chat_template": "{% if %}"}"#, "invalid chat template"),
    ];
    for (config, part) in configs {
        let folder = dir(&[("tokenizer_config.json", config)]);
        let error = ChatTemplate::from_dir(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Chat { .. }));
        let message = error.to_string();
        assert!(message.contains(part) && message.contains("tokenizer_config.json"), "{message}");
    }
}

#[test]
fn the_hash_is_that_of_the_text() {
    let template = ChatTemplate::new("{% generation %}x{% endgeneration %}", &[]).unwrap();
    assert_eq!(template.hash(), blake3::hash(template.text().as_bytes()).to_hex().to_string());
    assert_eq!(template.render::<String>(&[], false).unwrap(), "x");
}

#[test]
fn the_date_is_todays() {
    let template = ChatTemplate::new("{{ strftime_now('%Y') }}", &[]).unwrap();
    let year: u32 = template.render::<String>(&[], false).unwrap().parse().unwrap();
    assert!(year >= 2024);
    let template = ChatTemplate::new("{{ strftime_now('%') }}", &[]).unwrap();
    assert!(template.render::<String>(&[], false).unwrap_err().to_string().contains("no such format"));
}
