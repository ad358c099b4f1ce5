//! Models of the Hub in `cl generate`, `cl eval`, `cl train` and `cl sequence`, with a server on this machine.

#[path = "../../../cl-hub/tests/server/mod.rs"]
mod server;

use server::{COMMIT, Server};

use super::world::{CommandOutput, World};

/// A world whose model is also on the Hub.
fn world() -> (World, Server) {
    let (world, server) = (World::new(), Server::new());
    server.add_dir("o/m", &world.path("model"));
    (world, server)
}

fn run(world: &World, server: &Server, args: &[&str]) -> CommandOutput {
    let mut command = world.command(args);
    command.env("HF_ENDPOINT", &server.address).env("HF_HOME", world.path("hf"));
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"] {
        command.env_remove(name);
    }
    CommandOutput::of(&mut command)
}

fn ok(world: &World, server: &Server, args: &[&str]) -> String {
    let output = run(world, server, args);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    output.stdout
}

#[test]
fn generate_and_eval() {
    let (world, server) = world();
    let error = run(&world, &server, &["generate", "o/m", "--prompt", "a"]);
    assert_eq!(error.code, Some(1));
    assert!(error.stderr.contains("o/m: not found; add --hub"), "{}", error.stderr);
    let generate = ["generate", "o/m", "--prompt", "a", "--max-new-tokens", "3", "--hub"];
    let local = world.ok(["generate", "model", "--prompt", "a", "--max-new-tokens", "3"]);
    assert_eq!(ok(&world, &server, &generate), local);
    let eval = ["--tasks", "first", "--data", "data", "--limit", "2", "--max-new-tokens", "2", "--no-cache"];
    let of = |model: &'static str, out: &'static str| [&["eval", model, "--out", out, "--hub"][..], &eval].concat();
    ok(&world, &server, &of("o/m", "scores"));
    ok(&world, &server, &of("model", "local"));
    assert_eq!(world.read("scores/scores.json"), world.read("local/scores.json"));
    let results = world.read("scores/results.json");
    assert!(results.contains(&format!("o/m@{COMMIT}")) && !results.contains("hf/hub"), "{results}");
}

#[test]
fn training_is_the_same_and_names_the_commit() {
    let (world, server) = world();
    ok(&world, &server, &["train", "train.toml", "--set", "model=o/m", "--hub", "--out", "r"]);
    ok(&world, &server, &["train", "train.toml", "--out", "s"]);
    let adapter = "adapter/adapter_model.safetensors";
    assert!(
        std::fs::read(world.path(format!("r/{adapter}"))).unwrap()
            == std::fs::read(world.path(format!("s/{adapter}"))).unwrap()
    );
    assert_eq!(world.json("r/adapter/adapter_config.json")["base_model_name_or_path"], "o/m");
    let pinned = format!("o/m@{COMMIT}");
    assert_eq!(world.json("r/adapter/manifest.json")["sources"][0]["path"], pinned.as_str());
    assert!(world.read("r/config.toml").contains(&format!("model = \"{pinned}\"")));
    assert!(!world.read("r/base.blake3").contains("hf/hub"));
    // The resolved configuration reproduces the run, even with a different cache.
    let mut command = world.command(["train", "r/config.toml", "--hub", "--out", "t"]);
    let output = CommandOutput::of(command.env("HF_ENDPOINT", &server.address).env("HF_HOME", world.path("other")));
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    // The manifest of the model differs, because it contains the path of the adapter.
    for file in ["config.toml", adapter, "adapter/manifest.json", "model/model.safetensors"] {
        let bytes = |run: &str| std::fs::read(world.path(format!("{run}/{file}"))).unwrap();
        assert!(bytes("r") == bytes("t"), "{file} differs");
    }
    let checked = ok(&world, &server, &["check", "r/config.toml", "--hub"]);
    assert!(checked.contains("no problems found"), "{checked}");
}

#[test]
fn a_sequence_starts_from_it() {
    let (world, server) = world();
    ok(&world, &server, &["sequence", "lora.toml", "--set", "model=o/m", "--hub", "--out", "r"]);
    ok(&world, &server, &["sequence", "lora.toml", "--out", "s"]);
    assert_eq!(world.read("r/matrix.json"), world.read("s/matrix.json"));
    assert!(world.read("r/config.toml").contains(&format!("o/m@{COMMIT}")));
    let resumed =
        run(&world, &server, &["sequence", "lora.toml", "--set", "model=o/m", "--hub", "--out", "r", "--resume"]);
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
}

#[test]
fn a_trained_adapter_is_published_and_used_from_there() {
    let (world, server) = world();
    server.add("o/m", "README.md", b"---\nlicense: apache-2.0\n---\n# The base\n");
    server.state().token = "secret".to_owned();
    ok(&world, &server, &["train", "train.toml", "--set", "model=o/m", "--hub", "--out", "r"]);
    ok(
        &world,
        &server,
        &[
            "eval",
            "model",
            "--adapter",
            "r/adapter",
            "--tasks",
            "first",
            "--data",
            "data",
            "--max-new-tokens",
            "2",
            "--out",
            "scores",
        ],
    );
    let publish =
        ["publish", "r/adapter", "--repo", "me/lora", "--results", "scores/results.json", "--dataset", "o/data"];
    let with = |more: &[&'static str]| [&publish[..], more].concat();
    let told = ok(&world, &server, &with(&["--dry-run"]));
    let front = told.split("---\n").nth(1).unwrap();
    assert!(
        front.starts_with(
            "license: \"apache-2.0\"\nlibrary_name: \"peft\"\npipeline_tag: \"text-generation\"\n\
             base_model_relation: \"adapter\"\nbase_model:\n- \"o/m\"\ndatasets:\n- \"o/data\"\ntags:\n- \"lora\"\nmodel-index:\n"
        ),
        "{front}"
    );
    for part in ["## Lineage", &format!("| base | o/m@{COMMIT} |"), "## Training data", "## Settings", "## Scores"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(!told.contains(world.path("").to_str().unwrap()), "{told}");
    assert!(!server.state().repos.contains_key("me/lora"), "a dry run sends nothing");

    ok(&world, &server, &with(&["--out", "copy"]));
    assert!(cl_checkpoint::Manifest::verify(&world.path("copy")).unwrap().is_empty());
    assert!(world.read("copy/README.md").starts_with("---\nlicense"));

    let error = run(&world, &server, &with(&["--upload"]));
    assert!(error.code == Some(1) && error.stderr.contains("set HF_TOKEN"), "{}", error.stderr);
    let upload = |more: &[&'static str]| {
        let mut command = world.command(with(more));
        command.env("HF_ENDPOINT", &server.address).env("HF_HOME", world.path("hf")).env("HF_TOKEN", "secret");
        let output = CommandOutput::of(&mut command);
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        assert!(!output.stderr.contains("secret") && !output.stdout.contains("secret"));
        output.stdout
    };
    let told = upload(&["--upload", "--private"]);
    assert!(told.contains("me/lora: commit "), "{told}");
    assert!(upload(&["--upload"]).contains("files are already there"));
    let expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"];
    assert!(server.state().repos["me/lora"].files.keys().eq(expected.iter()));

    // Download it again, by its name.
    let generate = |adapter: &'static str| {
        ["generate", "o/m", "--adapter", adapter, "--prompt", "a", "--max-new-tokens", "4", "--hub"]
    };
    assert_eq!(ok(&world, &server, &generate("me/lora")), ok(&world, &server, &generate("r/adapter")));
}
