//! Indexes that contradict their shards, and directories with missing files.

use std::fs;
use std::path::Path;

use cl_checkpoint::{Checkpoint, TensorSource};
use serde_json::{Value, json};

#[cfg(unix)]
use super::names;
use super::{assert_error, safetensors};

const INDEX: &str = "model.safetensors.index.json";

/// Writes a shard with one byte for each name.
fn shard(dir: &Path, file: &str, tensors: &[&str]) {
    let entry =
        |(i, t): (usize, &&str)| ((*t).to_owned(), json!({"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}));
    let header: serde_json::Map<String, Value> = tensors.iter().enumerate().map(entry).collect();
    let data: Vec<u8> = (0..tensors.len() as u8).collect();
    fs::write(dir.join(file), safetensors(serde_json::to_vec(&header).unwrap(), &data)).unwrap();
}

/// Writes a model with `a` in the first shard, and `b` and `c` in the second.
fn model(dir: &Path, index: &str) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
    shard(dir, "1.safetensors", &["a"]);
    shard(dir, "2.safetensors", &["b", "c"]);
    fs::write(dir.join(INDEX), index).unwrap();
}

fn index(a: &str, b: &str, c: &str) -> String {
    json!({"metadata": {"total_size": 3}, "weight_map": {"a": a, "b": b, "c": c}}).to_string()
}

#[test]
fn shards_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), &index("1.safetensors", "2.safetensors", "2.safetensors"));
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.names(), ["a", "b", "c"]);
    assert_eq!((model.bytes("a").unwrap(), model.bytes("c").unwrap()), (&[0][..], &[1][..]));
    assert_eq!(model.files().count(), 2);
    assert_error("no such tensor", model.load_f32("d"), &["tensor `d` not found"]);
    assert_error("not floating", model.load_f32("c"), &["2.safetensors", "tensor `c`", "U8"]);
}

#[cfg(unix)]
#[test]
fn links_into_a_cache_are_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, dir) = (folder.path().join("blobs"), folder.path().join("snapshot"));
    model(&cache, "{}");
    fs::create_dir(&dir).unwrap();
    for name in names(&cache) {
        std::os::unix::fs::symlink(cache.join(&name), dir.join(&name)).unwrap();
    }
    fs::remove_file(dir.join(INDEX)).unwrap();
    fs::write(dir.join(INDEX), index("1.safetensors", "2.safetensors", "2.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(&dir).unwrap().names(), ["a", "b", "c"]);
}

#[test]
fn an_index_that_leads_outside_or_contradicts_its_shards_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside.safetensors");
    shard(folder.path(), "outside.safetensors", &["a"]);
    let (one, two) = ("1.safetensors", "2.safetensors");
    let rows: Vec<(&str, String, Vec<&str>)> = vec![
        ("absolute path", index(outside.to_str().unwrap(), two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("parent folder", index("../outside.safetensors", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("the parent itself", index("..", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("the directory itself", index(".", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("no name", index("", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("leading dot", index("./1.safetensors", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("trailing slash", index("1.safetensors/", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("sub-folder", index("sub/1.safetensors", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("backslash", index("..\\outside.safetensors", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("zero byte", index("1.safetensors\0", two, two), vec![INDEX, "`a`", "not the name of a file"]),
        ("missing shard", index("3.safetensors", two, two), vec!["3.safetensors", "not found", "incomplete"]),
        ("a shard that is none", index("config.json", two, two), vec!["config.json", "not a valid safetensors file"]),
        ("tensor in the wrong shard", index(one, one, two), vec![INDEX, two, "`b`", "puts it in `1.safetensors`"]),
        (
            "tensor in no shard",
            json!({"weight_map": {"a": one, "b": two, "c": two, "d": two}}).to_string(),
            vec![INDEX, "`d`", two],
        ),
        (
            "tensor not in the index",
            json!({"weight_map": {"a": one, "b": two}}).to_string(),
            vec![INDEX, two, "`c`", "does not list it"],
        ),
        (
            "a tensor twice",
            format!(r#"{{"weight_map":{{"a":"{two}","b":"{two}","c":"{two}","a":"{one}"}}}}"#),
            vec![INDEX, "`a` appears twice"],
        ),
        (
            "a file that is a number",
            json!({"weight_map": {"a": 1}}).to_string(),
            vec![INDEX, "`a`", "expected a string"],
        ),
        ("no tensors", json!({"weight_map": {}}).to_string(), vec![INDEX, "lists no tensors"]),
        ("no map", json!({"metadata": {}}).to_string(), vec![INDEX, "weight_map"]),
        ("a map that is a list", json!({"weight_map": []}).to_string(), vec![INDEX, "expected an object"]),
        ("not JSON", "{".to_owned(), vec![INDEX, "EOF"]),
        ("empty", String::new(), vec![INDEX, "EOF"]),
    ];
    let dir = folder.path().join("model");
    for (case, index, parts) in rows {
        model(&dir, &index);
        assert_error(case, Checkpoint::open(&dir), &parts);
    }
}

#[test]
fn what_a_directory_lacks_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    assert_error("not a directory", Checkpoint::open(&dir), &["model: not found"]);
    fs::create_dir(&dir).unwrap();
    assert_error("no config", Checkpoint::open(&dir), &["config.json: not found"]);
    for (case, text, part) in [("not JSON", "{", "not valid JSON"), ("a list", "[1]", "expected a JSON object")] {
        fs::write(dir.join("config.json"), text).unwrap();
        assert_error(case, Checkpoint::open(&dir), &["config.json", part]);
    }
    fs::write(dir.join("config.json"), "{}").unwrap();
    assert_error("no weights", Checkpoint::open(&dir), &["model.safetensors: not found", "index.json"]);
    fs::write(dir.join("pytorch_model.bin"), "").unwrap();
    assert_error("pickle only", Checkpoint::open(&dir), &["model.safetensors: not found", "pytorch_model.bin"]);
}
