use std::path::Path;

use crate::world::World;

/// A two-layer Llama model with the tokenizer of SmolLM2, written by the `make_gguf.py` next to it.
const LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../cl-checkpoint/tests/fixtures/llama.gguf");

#[test]
fn a_gguf_file_becomes_a_model_that_writes() {
    let world = World::new();
    let line = world.ok(["import-gguf", LLAMA, "imported"]);
    assert!(line.starts_with("imported: llama model, ") && line.lines().count() == 1, "{line}");
    world.ok(["check", "imported"]);
    let text = ["generate", "imported", "--prompt", "Hello world", "--max-new-tokens", "4", "--ids"];
    assert!(!serde_json::from_str::<Vec<u32>>(&world.ok(text)).unwrap().is_empty());
}

#[test]
fn an_output_that_is_there_is_replaced_only_when_it_is_a_model_and_asked_for() {
    let world = World::new();
    world.ok(["import-gguf", LLAMA, "imported"]);
    let message = world.fails(["import-gguf", LLAMA, "imported", "--dtype", "f32"]);
    assert!(message.contains("imported: already exists; add --overwrite"), "{message}");
    assert!(world.json("imported/config.json")["torch_dtype"] == "bfloat16");
    world.ok(["import-gguf", LLAMA, "imported", "--dtype", "f32", "--overwrite"]);
    assert!(world.json("imported/config.json")["torch_dtype"] == "float32");
    for (other, why) in [("data", "contains neither"), ("train.toml", "is a file")] {
        let message = world.fails(["import-gguf", LLAMA, other, "--overwrite"]);
        assert!(message.contains(why) && message.contains("not overwritten"), "{message}");
    }
    assert!(world.exists("data/first/train.json"));
}

#[test]
fn what_is_no_gguf_file_leaves_nothing() {
    let world = World::new();
    let whole = std::fs::read(LLAMA).unwrap();
    std::fs::write(world.path("cut.gguf"), &whole[..whole.len() / 2]).unwrap();
    for (file, part) in [
        ("nowhere.gguf", "nowhere.gguf: not found"),
        ("train.toml", "train.toml: not a GGUF file"),
        ("model", "model: is a directory"),
        ("cut.gguf", "cut.gguf"),
    ] {
        let message = world.fails(["import-gguf", file, "imported"]);
        assert!(message.contains(part), "{message}");
        assert_eq!(message.matches("not found").count(), usize::from(file == "nowhere.gguf"), "{message}");
        assert!(!world.exists("imported"), "{file}");
    }
    assert!(Path::new(LLAMA).exists());
}
