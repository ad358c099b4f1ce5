//! Merges of models from the Hub, with the binary and a local server.

#![cfg(feature = "cli")]

#[path = "../../../cl-hub/tests/server/mod.rs"]
mod server;

use std::path::Path;
use std::process::Command;

use cl_checkpoint::{Checkpoint, Manifest, TensorSource};
use server::{COMMIT, Server};

use super::models::Llama;

/// A folder with models in `local/o`, a server with the same models, and an empty cache.
struct Place {
    folder: tempfile::TempDir,
    server: Server,
}

const MERGE: &str = "
merge_method: dare_ties
base_model: o/base
models:
  - model: o/a
    parameters: {weight: 0.5, density: 0.5}
  - model: {model: {path: o/base, revision: v1}, lora: {path: o/lora}}
    parameters: {weight: 0.5, density: 0.5}
dtype: bfloat16
";

impl Place {
    fn new() -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap(), server: Server::new() };
        let local = place.folder.path().join("local/o");
        Llama::default().write(&local.join("base"), 0);
        Llama { max_shard_size: 4000, ..Llama::default() }.write(&local.join("a"), 1);
        let (base, a, lora) = (local.join("base"), local.join("a"), local.join("lora"));
        let extract = ["adapter", "extract", text(&base), text(&a), "--rank", "2", "--out", text(&lora)];
        place.ok("local", &extract);
        for name in ["base", "a", "lora"] {
            place.server.add_dir(&format!("o/{name}"), &local.join(name));
            // A file that no merge needs.
            place.server.add(&format!("o/{name}"), "pytorch_model.bin", &[0; 5000]);
        }
        place.server.state().repos.get_mut("o/base").unwrap().revisions.push("v1".to_owned());
        std::fs::create_dir(place.folder.path().join("remote")).unwrap();
        std::fs::write(place.folder.path().join("merge.yml"), MERGE).unwrap();
        place
    }

    fn command(&self, dir: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cl-merge"));
        command.args(args).current_dir(self.folder.path().join(dir)).env("HF_ENDPOINT", &self.server.address);
        command.env("HF_HOME", self.folder.path().join("hf")).env("HF_TOKEN", "secret");
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command
    }

    fn run(&self, dir: &str, args: &[&str]) -> (bool, String, String) {
        let output = self.command(dir, args).output().unwrap();
        let string = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.success(), string(output.stdout), string(output.stderr))
    }

    fn ok(&self, dir: &str, args: &[&str]) -> String {
        let (success, out, error) = self.run(dir, args);
        assert!(success, "{error}");
        out
    }

    fn fails(&self, args: &[&str]) -> String {
        let (success, _, error) = self.run("remote", args);
        assert!(!success);
        error
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_same_bytes_as_from_local_directories_of_these_names() {
    let place = Place::new();
    // `@v1` is not part of any local name.
    let local = MERGE.replace(", revision: v1", "");
    std::fs::write(place.folder.path().join("local.yml"), local).unwrap();
    place.ok("local", &["run", "../local.yml", "--out", "out"]);

    let error = place.fails(&["run", "../merge.yml", "--out", "out"]);
    assert!(error.contains("o/base: not found; add --hub"), "{error}");
    let told = place.ok("remote", &["run", "../merge.yml", "--out", "out", "--hub", "--dry-run"]);
    let line = told.lines().find(|line| line.starts_with("o/lora: ")).unwrap();
    let needed = ["README.md", "adapter_config.json", "adapter_model.safetensors"];
    let bytes: usize = needed.iter().map(|name| place.server.state().repos["o/lora"].files[*name].len()).sum();
    assert!(line.contains("3 files to download") && line.contains(&format!("({bytes} bytes)")), "{line}");
    assert!(
        told.contains("nothing was downloaded or written")
            && !place.folder.path().join("hf/hub/models--o--a/snapshots").exists()
    );

    place.ok("remote", &["run", "../merge.yml", "--out", "out", "--hub"]);
    let open = |dir: &str| Checkpoint::open(&place.folder.path().join(dir)).unwrap();
    let (a, b) = (open("local/out"), open("remote/out"));
    // The model with an adapter has another name there, and so other random masks.
    let same = a.names().iter().filter(|name| a.bytes(name).unwrap() == b.bytes(name).unwrap()).count();
    assert_eq!(a.names(), b.names());
    assert!(same < a.names().len(), "masks are keyed by names");

    // The sources are recorded with pinned commits, independently of the cache's location.
    let out = place.folder.path().join("remote/out");
    let sources: Vec<String> = Manifest::read(&out).unwrap().sources.into_iter().map(|s| s.path).collect();
    assert_eq!(sources, ["base", "a", "base", "lora"].map(|name| format!("o/{name}@{COMMIT}")));
    let resolved = std::fs::read_to_string(out.join("merge_config.toml")).unwrap();
    assert!(resolved.contains(&format!("\"o/base@v1\" = \"{COMMIT}\"")) && !resolved.contains("hf/hub"), "{resolved}");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\nbase_model:\n- \"o/base\"\n- \"o/a\"\n- \"o/lora\"\nlibrary_name"), "{card}");

    // The resolved file reproduces the output, from the cache and after the branch has moved.
    place.server.state().repos.get_mut("o/a").unwrap().commits = 1;
    let mut again = place.command("remote", &["run", "out/merge_config.toml", "--out", "again", "--hub"]);
    let output = again.env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let again = open("remote/again");
    assert!(b.names().iter().all(|name| b.bytes(name).unwrap() == again.bytes(name).unwrap()));
}

#[test]
fn random_masks_do_not_depend_on_where_models_are() {
    let place = Place::new();
    let plain = MERGE.replace(", revision: v1", "");
    std::fs::write(place.folder.path().join("merge.yml"), plain).unwrap();
    place.ok("local", &["run", "../merge.yml", "--out", "out"]);
    place.ok("remote", &["run", "../merge.yml", "--out", "out", "--hub"]);
    let open = |dir: &str| Checkpoint::open(&place.folder.path().join(dir)).unwrap();
    let (a, b) = (open("local/out"), open("remote/out"));
    assert!(a.names().iter().all(|name| a.bytes(name).unwrap() == b.bytes(name).unwrap()));
    let state = place.server.state();
    assert!(state.log.iter().all(|line| line.starts_with("storage") != line.contains("secret")), "{:?}", state.log);
    assert!(!state.log.iter().any(|line| line.contains("pytorch_model.bin")));
}

#[test]
fn a_killed_merge_continues_its_download() {
    let place = Place::new();
    // The weights of the first model are always truncated in transfer.
    place.server.state().cut = usize::MAX;
    let error = place.fails(&["run", "../merge.yml", "--out", "out", "--hub"]);
    assert!(error.contains("interrupted after"), "{error}");
    assert!(!place.folder.path().join("remote/out").exists());
    place.server.state().cut = 0;
    place.server.state().log.clear();
    place.ok("remote", &["run", "../merge.yml", "--out", "out", "--hub"]);
    assert!(place.server.state().log.iter().any(|line| line.contains("bytes=")));
    let offline =
        place.command("remote", &["run", "../merge.yml", "--out", "out2", "--hub"]).env("HF_HUB_OFFLINE", "1").output();
    assert!(offline.unwrap().status.success());
    let mut other = place.command("remote", &["run", "../merge.yml", "--out", "out3", "--hub"]);
    let other = other.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "nowhere").output().unwrap();
    let error = String::from_utf8(other.stderr).unwrap();
    assert!(error.contains("o/base at revision main: the model is not in") && error.contains("unset it"), "{error}");
}

#[test]
fn adapters_of_the_hub() {
    let place = Place::new();
    place.ok("remote", &["adapter", "fold", "o/base", "o/lora", "--hub", "--out", "folded"]);
    place.ok("local", &["adapter", "fold", "o/base", "o/lora", "--out", "folded"]);
    let read = |name: &str| std::fs::read(place.folder.path().join(name)).unwrap();
    assert_eq!(read("remote/folded/model.safetensors"), read("local/folded/model.safetensors"));
    let sources = Manifest::read(&place.folder.path().join("remote/folded")).unwrap().sources;
    assert_eq!(sources[1].path, format!("o/lora@{COMMIT}"));
    place.ok("remote", &["adapter", "extract", "o/base", "o/a", "--rank", "2", "--out", "lora", "--hub"]);
    let config: serde_json::Value = serde_json::from_slice(&read("remote/lora/adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], "o/base");
    let info = place.ok("remote", &["adapter", "info", "o/lora", "--hub"]);
    assert!(info.contains("LoRA") || info.contains("LORA"), "{info}");
    let error = place.fails(&["diff", "o/a", "o/lora", "--hub"]);
    assert!(error.contains("o/lora at revision main: it is an adapter"), "{error}");
}
