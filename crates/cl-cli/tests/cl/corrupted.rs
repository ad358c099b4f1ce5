//! Damaged model directories, given to every command that reads a model.

use serde_json::{Value, json};

use crate::world::{World, edit_header};

const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";

/// A description, a way to damage the model in `m`, and what every command must report.
type Damage = (&'static str, fn(&World), &'static [&'static str]);

const DAMAGES: [Damage; 11] = [
    ("truncated weights", truncate, &["m/model.safetensors", "tensor `model.", "lie outside the file's"]),
    (
        "weights that are another file",
        |w| w.write("m/model.safetensors", "<html>"),
        &["m/model.safetensors", "6 bytes"],
    ),
    ("an empty file", |w| w.write("m/model.safetensors", ""), &["m/model.safetensors", "empty"]),
    ("a shape that is another", transpose, &[TENSOR, "config.json implies [32, 16], but the file has [16, 32]"]),
    ("a missing tensor", rename, &["missing: [model.layers.1.mlp.up_proj.weight]", "not used: [other]"]),
    ("an index that leads out", lead_out, &["m/model.safetensors.index.json", TENSOR, "not the name of a file"]),
    (
        "another architecture",
        |w| config(w, "architectures", Some(json!(["GPT2LMHeadModel"]))),
        &["`GPT2LMHeadModel`", "Llama"],
    ),
    ("a config without a key", |w| config(w, "hidden_size", None), &["m/config.json", "missing field `hidden_size`"]),
    ("a config that is no JSON", |w| w.write("m/config.json", "{"), &["m/config.json", "not valid JSON"]),
    ("no tokenizer", |w| std::fs::remove_file(w.path("m/tokenizer.json")).unwrap(), &["m/tokenizer.json: not found"]),
    ("a broken tokenizer", |w| w.write("m/tokenizer.json", r#"{"model": 3}"#), &["m/tokenizer.json: "]),
];

const GENERATE: [&str; 6] = ["generate", "m", "--prompt", "a", "--max-new-tokens", "2"];

/// Commands that are tested in turn, one per damage, in addition to `cl generate`.
const OTHERS: [&[&str]; 3] = [
    &["eval", "m", "--tasks", "homes.jsonl", "--data", "data", "--out", "e"],
    &["train", "train.toml", "--set", "model=m", "--out", "r"],
    &["sequence", "lora.toml", "--set", "model=m", "--out", "s"],
];

#[test]
fn damaged_models_are_refused_by_name_and_leave_no_output() {
    let world = World::new();
    for ((what, damage, parts), other) in DAMAGES.into_iter().zip(OTHERS.into_iter().cycle()) {
        world.copy_dir("model", "m");
        damage(&world);
        for command in [&GENERATE, other] {
            let message = world.fails(command);
            assert!(message.trim_end().lines().count() == 1, "{what}, {}: {message}", command[0]);
            for part in parts {
                assert!(message.contains(part), "{what}, {}: {part} is not in {message}", command[0]);
            }
        }
        for output in ["e", "r", "s"] {
            assert!(!world.exists(output), "{what}: {output}");
        }
        std::fs::remove_dir_all(world.path("m")).unwrap();
    }
}

fn truncate(world: &World) {
    let file = std::fs::read(world.path("m/model.safetensors")).unwrap();
    std::fs::write(world.path("m/model.safetensors"), &file[..file.len() - 1000]).unwrap();
}

fn transpose(world: &World) {
    edit_header(&world.path("m/model.safetensors"), |header| {
        header[TENSOR]["shape"].as_array_mut().unwrap().reverse();
    });
}

fn rename(world: &World) {
    edit_header(&world.path("m/model.safetensors"), |header| {
        let entry = header.remove(TENSOR).unwrap();
        header.insert("other".to_owned(), entry);
    });
}

fn lead_out(world: &World) {
    std::fs::remove_file(world.path("m/model.safetensors")).unwrap();
    let index = json!({"metadata": {}, "weight_map": {TENSOR: "../model/model.safetensors"}});
    world.write("m/model.safetensors.index.json", &index.to_string());
}

fn config(world: &World, key: &str, value: Option<Value>) {
    let mut config = world.json("m/config.json");
    config.as_object_mut().unwrap().remove(key);
    config.as_object_mut().unwrap().extend(value.map(|v| (key.to_owned(), v)));
    world.write("m/config.json", &config.to_string());
}

#[test]
fn training_needs_an_end_token_and_generation_does_not() {
    let world = World::new();
    std::fs::remove_file(world.path("model/tokenizer_config.json")).unwrap();
    world.ok(["generate", "model", "--prompt", "a", "--max-new-tokens", "2"]);
    let message = world.fails(["train", "train.toml", "--out", "r"]);
    assert!(message.contains("model/tokenizer.json: no eos_token; training requires one"), "{message}");
    assert!(!world.exists("r"));
}
