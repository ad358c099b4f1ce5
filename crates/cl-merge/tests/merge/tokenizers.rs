//! Merges of models with different tokenizers, compared with mergekit (see `fixtures/make_tokenizers.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, SafetensorsFile, TensorSource, convert};
use cl_merge::{Error, MergeFile, MergeOptions, Plan, TokenKind, TokenSource, merge};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::{fixtures, values};

fn folder() -> PathBuf {
    fixtures().join("tokenizers")
}

/// Resolves the models of a merge file relative to the folder of tokenizers.
fn placed(mut file: MergeFile) -> MergeFile {
    let place = |model: &mut String| *model = folder().join(&*model).display().to_string();
    for stage in &mut file.stages {
        stage.base_model.iter_mut().for_each(place);
        stage.models.iter_mut().for_each(|m| place(&mut m.model));
        let Some(tokenizer) = &mut stage.tokenizer else { continue };
        if !["union", "base"].contains(&tokenizer.source.as_str()) {
            place(&mut tokenizer.source);
        }
        for token in &mut tokenizer.tokens {
            use TokenSource::{Kind, Model};
            if let Some(Model(model) | Kind(TokenKind::ModelToken { model, .. })) = &mut token.source {
                place(model);
            }
        }
    }
    file
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn run(file: &MergeFile, options: &MergeOptions) -> (tempfile::TempDir, Checkpoint, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let plan = Plan::new(&file.stages[0]).unwrap_or_else(|e| panic!("{e}"));
    merge(&plan, &out, options, &|_| ()).unwrap_or_else(|e| panic!("{e}"));
    let merged = Checkpoint::open(&out).unwrap();
    (folder, merged, plan.notes)
}

fn tokens(out: &Path) -> BTreeMap<String, usize> {
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    tokenizer.get_vocab(true).into_iter().map(|(token, id)| (token, id as usize)).collect()
}

/// Compares every tensor, token tables row by token, and how the written tokenizer splits texts. Sums are of three
/// terms in f32 at weights of about 0.3, and means of rows are rounded once here: 1e-7 is two units in the last place.
#[test]
fn mergekits_token_tables_and_tokenizers() {
    let cases = ["union", "of_base", "of_model", "union_linear", "tokens", "short_base"];
    for case in cases {
        let file = placed(MergeFile::read(&folder().join(format!("{case}.yaml"))).unwrap_or_else(|e| panic!("{e}")));
        let (out, merged, _) = run(&file, &MergeOptions::default());
        let out = out.path().join("out");
        let expected = SafetensorsFile::open(&folder().join(format!("{case}.safetensors"))).unwrap();
        let record = json(&folder().join(format!("{case}.json")));
        let theirs: BTreeMap<String, usize> = serde_json::from_value(record["tokens"].clone()).unwrap();
        let ours = tokens(&out);
        assert!(ours.keys().eq(theirs.keys()), "{case}: {ours:?}");
        // In a union, mergekit numbers the tokens that the base lacks in no particular order.
        let of_base = tokens(&folder().join("base"));
        let free = |token: &String| case.contains("union") || case == "tokens" && !of_base.contains_key(token);
        let fixed = |token: &&String| of_base.contains_key(*token) || !free(token);
        theirs.keys().filter(fixed).for_each(|token| assert_eq!(ours[token], theirs[token], "{case}: {token}"));
        let mut worst = 0.0f32;
        assert_eq!(merged.names(), expected.names(), "{case}");
        for (name, values) in values(&merged) {
            let info = expected.info(&name).unwrap();
            let other = convert::to_f32(info.dtype, expected.bytes(&name).unwrap()).unwrap();
            assert_eq!(merged.info(&name).unwrap().shape, info.shape, "{case}: {name}");
            let columns = *info.shape.last().unwrap();
            let table = name.contains("embed") || name.contains("lm_head");
            let rows: Vec<(usize, usize)> = if table {
                let padding = (theirs.len()..info.shape[0]).map(|row| (row, row));
                ours.iter().map(|(token, id)| (*id, theirs[token])).chain(padding).collect()
            } else {
                (0..values.len() / columns).map(|row| (row, row)).collect()
            };
            assert_eq!(rows.len() * columns, values.len());
            for (a, b) in rows {
                let pairs = values[a * columns..][..columns].iter().zip(&other[b * columns..][..columns]);
                pairs.for_each(|(a, b)| worst = worst.max((a - b).abs()));
            }
        }
        println!("{case}: {worst:.1e} at most");
        assert!(worst < 1e-7, "{case}: {worst:.1e}");
        assert_eq!(merged.config()["vocab_size"], record["vocab_size"], "{case}");
        let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
        for (text, split) in record["texts"].as_object().unwrap() {
            let encoding = tokenizer.encode(text.as_str(), true).unwrap();
            let tokens: Vec<String> = encoding.get_ids().iter().map(|id| tokenizer.id_to_token(*id).unwrap()).collect();
            assert_eq!(&Value::from(tokens), split, "{case}: {text}");
        }
        let template = fs::read_to_string(out.join("chat_template.jinja")).ok();
        let template = template.map(Value::from).unwrap_or_else(|| {
            json(&out.join("tokenizer_config.json")).get("chat_template").cloned().unwrap_or(Value::Null)
        });
        assert_eq!(template, record["chat_template"], "{case}");
        let config = json(&out.join("tokenizer_config.json"));
        for (id, token) in config["added_tokens_decoder"].as_object().unwrap() {
            assert_eq!(ours[token["content"].as_str().unwrap()], id.parse::<usize>().unwrap(), "{case}");
        }
    }
}

/// With the tokens of another model, its special token ids are used, whereas mergekit keeps the base's.
#[test]
fn special_tokens_keep_their_numbers() {
    let file = placed(MergeFile::read(&folder().join("of_model.yaml")).unwrap());
    let (out, merged, _) = run(&file, &MergeOptions::default());
    let ids = tokens(&out.path().join("out"));
    let base = json(&folder().join("base/config.json"));
    for (key, token) in [("bos_token_id", "<s>"), ("eos_token_id", "</s>")] {
        assert_eq!(merged.config()[key], ids[token], "{key}");
        assert_ne!(merged.config()[key], base[key]);
    }
}

const UNION: &str = r#"
    base_model = "base"
    chat_template = "CHAT"
    [method.ties]
    density = 0.7
    [tokenizer]
    source = "union"
    pad_to_multiple_of = 4
    [[tokenizer.tokens]]
    token = "<z>"
    source = { kind = "zero" }
    [[tokenizer.tokens]]
    token = "<b>"
    source = { kind = "model_token", model = "a", token = "the" }
    [[models]]
    model = "a"
    [[models]]
    model = "b"
"#;

/// The resolved file reproduces the output, as does any number of threads. If there is nothing to align, `tokenizer`
/// does not change the output.
#[test]
fn outputs_are_reproducible() {
    let file = placed(MergeFile::from_toml(&UNION.replace("CHAT", "{{ x }}")).unwrap());
    let (first, merged, notes) = run(&file, &MergeOptions { threads: 1, ..MergeOptions::default() });
    assert!(notes.iter().any(|note| note.contains("become added tokens")), "{notes:?}");
    assert_eq!(merged.info("lm_head.weight").unwrap().shape[0] % 4, 0);
    let again = MergeFile::read(&first.path().join("out/merge_config.toml")).unwrap();
    let (second, ..) = run(&again, &MergeOptions { threads: 3, ..MergeOptions::default() });
    for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"] {
        let read = |folder: &tempfile::TempDir| fs::read(folder.path().join("out").join(name)).unwrap();
        assert!(read(&first) == read(&second), "{name}");
    }
    let same = |tokenizer: &str| {
        let text = format!(
            "base_model = \"b\"\n{tokenizer}\n[method.linear]\n[[models]]\nmodel = \"b\"\n[[models]]\nmodel = \"b\"\n"
        );
        let (out, ..) = run(&placed(MergeFile::from_toml(&text).unwrap()), &MergeOptions::default());
        let read = |name: &str| fs::read(out.path().join("out").join(name)).unwrap();
        (read("model.safetensors"), read("tokenizer.json"))
    };
    assert!(same("") == same("tokenizer = { source = \"union\" }"));
    assert!(same("") == same("tokenizer_source = \"union\""));
}

/// The template of most models, of one model, or as text; anything else is an error.
#[test]
fn chat_templates() {
    let template = |chat: &str| {
        let file = placed(MergeFile::from_toml(&UNION.replace("CHAT", chat)).unwrap());
        let (out, ..) = run(&file, &MergeOptions::default());
        let out = out.path().join("out");
        let config = json(&out.join("tokenizer_config.json"));
        assert!(config.get("chat_template").is_none() && config["eos_token"] == "</s>");
        fs::read_to_string(out.join("chat_template.jinja")).unwrap()
    };
    assert_eq!(template("auto"), "{{ messages }}-tuned");
    assert_eq!(template(folder().join("base").to_str().unwrap()), "{{ messages }}-base");
    assert_eq!(template("{{ text }}"), "{{ text }}");
    for (chat, part) in [("chatml", "named templates are not supported"), ("short", "nor a model, nor a template")] {
        assert!(problem(&UNION.replace("CHAT", chat)).contains(part));
    }
}

/// Transformers would add special tokens named in `tokenizer_config.json` again, and would read an unchanged
/// SentencePiece model.
#[test]
fn tokens_without_a_row_are_special_no_more() {
    let temporary = tempfile::tempdir().unwrap();
    let model = temporary.path().join("model");
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(folder().join("short")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let edit = |name: &str, changes: Value| {
        let mut value =
            if model.join(name).exists() { json(&model.join(name)) } else { Value::Object(Default::default()) };
        value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        fs::write(model.join(name), value.to_string()).unwrap();
    };
    let special = serde_json::json!({"additional_special_tokens": ["<cut>", "<s>"], "pad_token": "<cut>"});
    edit("tokenizer_config.json", special);
    let described = serde_json::json!({
        "additional_special_tokens": [{"content": "<cut>"}, "</s>"], "pad_token": {"content": "<cut>"}, "eos_token": "</s>",
    });
    edit("special_tokens_map.json", described);
    fs::write(model.join("tokenizer.model"), "pieces").unwrap();
    let text = |tokenizer: &str| {
        MergeFile::from_toml(&format!("{tokenizer}method = \"linear\"\n[[models]]\nmodel = {model:?}\n")).unwrap()
    };
    let (out, _, notes) = run(&text("tokenizer = { source = \"base\" }\n"), &MergeOptions::default());
    let out = out.path().join("out");
    assert!(!tokens(&out).contains_key("<cut>"));
    let config = json(&out.join("tokenizer_config.json"));
    assert_eq!(config["additional_special_tokens"], serde_json::json!(["<s>"]));
    assert_eq!((config.get("pad_token"), config["eos_token"].as_str()), (None, Some("</s>")));
    let map = json(&out.join("special_tokens_map.json"));
    assert_eq!(map, serde_json::json!({"additional_special_tokens": ["</s>"], "eos_token": "</s>"}));
    assert!(!out.join("tokenizer.model").exists() && notes.iter().any(|note| note.contains("tokenizer.model")));
    // An unchanged tokenizer is copied with all of its files.
    let (out, ..) = run(&text(""), &MergeOptions::default());
    assert!(out.path().join("out/tokenizer.model").exists());
}

fn problem(text: &str) -> String {
    match Plan::new(&placed(MergeFile::from_toml(text).unwrap()).stages[0]) {
        Err(error @ Error::Problems(_)) => error.to_string(),
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn what_cannot_be_aligned_is_named() {
    let text = UNION.replace("CHAT", "auto");
    let with = |from: &str, to: &str| problem(&text.replace(from, to));
    assert!(with("model = \"a\", token = \"the\"", "model = \"a\", token = \"dog\"").contains("has no token `dog`"));
    assert!(
        with("model = \"a\", token = \"the\"", "model = \"short\", token = \"the\"").contains("not one of the models")
    );
    assert!(with("model = \"a\", token = \"the\"", "model = \"a\"").contains("either `token` or `token_id`"));
    assert!(with("pad_to_multiple_of = 4", "pad_to_multiple_of = 0").contains("at least 1"));
    assert!(with("source = \"union\"", "source = \"short\"").contains("is not one of the models"));
    assert!(with("source = { kind = \"zero\" }", "source = \"b\"").contains("does not have this token"));
    assert!(with("chat_template", "tokenizer_source = \"base\"\nchat_template").contains("set either `tokenizer`"));
    let models = fixtures().join("models");
    let (base, tuned) = (models.join("base"), models.join("ft0"));
    let text = format!(
        "base_model = {base:?}\ntokenizer = {{ source = \"base\" }}\n[method.ties]\n[[models]]\nmodel = {tuned:?}\n"
    );
    assert!(problem(&text).contains("has no tokenizer.json"));
}
