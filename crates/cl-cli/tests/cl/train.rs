use std::collections::BTreeSet;

use serde_json::json;

use crate::world::{World, assert_same, content};

#[test]
fn a_round_of_lora_leaves_what_is_documented() {
    let world = World::new();
    let run = world.run(["train", "train.toml", "--out", "r"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert!(lines[0].starts_with("12 steps, mean loss over the last 10% of steps "), "{lines:?}");
    assert_eq!(lines[1..], ["adapter  r/adapter", "model    r/model"]);
    assert!(run.stderr.contains("training") && run.stderr.contains("12 steps"), "{}", run.stderr);
    let names: Vec<String> = content(&world.path("r")).into_iter().map(|f| f.0).collect();
    let expected = [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/manifest.json",
        "base.blake3",
        "config.toml",
        "data.blake3",
        "log.jsonl",
        "model/config.json",
        "model/manifest.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "rows.json",
    ];
    assert_eq!(names, expected);
    let steps: Vec<u64> = world.lines("r/log.jsonl").iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>());
    let manifest = world.json("r/adapter/manifest.json");
    assert_eq!(manifest["sources"][1]["path"], "data/first/train.json");
    assert_eq!(world.json("r/adapter/adapter_config.json")["base_model_name_or_path"], "model");
}

#[test]
fn an_adapter_of_a_quantized_base_is_a_plain_adapter_of_the_base() {
    let world = World::new();
    for base in ["nf4", "int8"] {
        let set = format!("train.lora.base={base}");
        world.ok(["train", "train.toml", "--out", base, "--set", &set]);
        let manifest = world.json(&format!("{base}/adapter/manifest.json"));
        assert_eq!(manifest["config"]["train"]["lora"]["base"], base);
        assert!(world.read(&format!("{base}/config.toml")).contains(&format!("base = \"{base}\"")));
    }
    world.ok(["train", "train.toml", "--out", "dense"]);
    let config = |run: &str| world.json(&format!("{run}/adapter/adapter_config.json"));
    assert_eq!(config("nf4"), config("dense"));
    let adapter = |run: &str| std::fs::read(world.path(format!("{run}/adapter/adapter_model.safetensors"))).unwrap();
    assert_ne!(adapter("nf4"), adapter("dense"));
    // It is folded into the original, unquantized base.
    world.ok(["adapter", "fold", "model", "nf4/adapter", "--out", "folded"]);
    let model = |dir: &str| std::fs::read(world.path(format!("{dir}/model.safetensors"))).unwrap();
    assert_eq!(model("folded"), model("nf4/model"));
    world.ok(["generate", "model", "--adapter", "nf4/adapter", "--prompt", "mood", "--max-new-tokens", "2"]);

    for (set, part) in [
        ("train.lora.base=fp4", "unknown value `fp4`, expected `nf4` or `int8`"),
        ("train.lora.modules_to_save=['up_proj']", "`base` quantizes the other weights"),
        ("train.zero_stage=3", "quantized weights are not divided"),
    ] {
        let run =
            world.run(["train", "train.toml", "--out", "refused", "--set", "train.lora.base='nf4'", "--set", set]);
        assert!(run.code != Some(0) && run.stderr.contains(part), "{set}: {}", run.stderr);
    }
    let full = world.read("train.toml").replace("[train.lora]\nr = 2", "[train.full]\nbase = \"nf4\"");
    world.write("full.toml", &full);
    let run = world.run(["train", "full.toml", "--out", "refused"]);
    assert!(run.code != Some(0) && run.stderr.contains("unknown key `base`"), "{}", run.stderr);
    assert!(!world.exists("refused"));
}

#[test]
fn the_saved_configuration_makes_the_same_bytes_again() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r", "--set", "seed=7", "--set", "train.lora.lora_dropout=0.2"]);
    world.ok(["train", "r/config.toml", "--out", "s"]);
    assert_same(&world.path("r/adapter"), &world.path("s/adapter"));
    world.ok(["train", "r/config.toml", "--out", "t", "--set", "seed=8"]);
    assert_ne!(content(&world.path("r/adapter")), content(&world.path("t/adapter")));
}

#[test]
fn all_weights_move_in_full_fine_tuning() {
    let world = World::new();
    let full = world.read("train.toml").replace("[train.lora]\nr = 2", "[train.full]");
    world.write("full.toml", &full);
    let stdout = world.ok(["train", "full.toml", "--out", "r"]);
    assert!(stdout.contains("model    r/model") && !stdout.contains("adapter"), "{stdout}");
    assert!(!world.exists("r/adapter") && !world.exists("r/state"));
    assert_ne!(content(&world.path("r/model"))[2], content(&world.path("model"))[2], "model.safetensors");
}

#[test]
fn replay_draws_rows_of_earlier_files_anew_each_epoch() {
    let world = World::new();
    let set = ["--set", "data.earlier=['data/mood', 'data/last/train.json']", "--set", "replay.fraction=0.5"];
    world.ok(["train", "train.toml", "--out", "r"].iter().chain(&set));
    let rows = world.rows("r");
    assert_eq!(rows.len(), 3 * (16 + 8 + 8));
    let drawn = |dataset: &str, epoch: u64| -> BTreeSet<u64> {
        let of_epoch = rows.iter().filter(|r| r["dataset"] == dataset && r["epoch"] == epoch);
        of_epoch.map(|r| r["row"].as_u64().unwrap()).collect()
    };
    for dataset in ["mood", "train"] {
        let epochs: Vec<_> = (0..3).map(|e| drawn(dataset, e)).collect();
        assert!(epochs.iter().all(|e| e.len() == 8), "{dataset}: {epochs:?}");
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2], "{dataset}: {epochs:?}");
    }
    assert_eq!(drawn("first", 0).len(), 16, "every row of its own");
}

#[test]
fn data_sets_of_one_name_are_told_apart_by_their_paths() {
    let world = World::new();
    let set = ["--set", "data.train=data/first/train.json", "--set", "data.earlier=['data/last/train.json']"];
    world.ok(["train", "train.toml", "--out", "r", "--set", "replay.fraction=0.5"].iter().chain(&set));
    let names: BTreeSet<String> = world.rows("r").iter().map(|r| r["dataset"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["data/first/train.json", "data/last/train.json"]);
}

#[test]
fn a_round_goes_on_from_an_adapter() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r", "--set", "train.lora.lora_alpha=6.0"]);
    world.ok(["train", "train.toml", "--out", "s", "--set", "train.initial_adapter=r/adapter"]);
    let first = |out: &str| world.lines(&format!("{out}/log.jsonl"))[0]["loss"].as_f64().unwrap();
    assert!(first("s") < first("r"), "{} {}", first("s"), first("r"));
    // Rank and scaling are those of the initial adapter, and the manifest records what the result was made from.
    assert_eq!(world.json("s/adapter/adapter_config.json")["lora_alpha"], json!(6.0));
    let sources = world.json("s/adapter/manifest.json")["sources"].clone();
    assert_eq!(sources[2]["role"], "initial_adapter");
    assert!(world.read("s/data.blake3").contains("  r/adapter/adapter_model.safetensors\n"));
}

#[test]
fn a_second_run_into_the_same_output_needs_resume_and_the_same_configuration() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r"]);
    let before = content(&world.path("r"));
    let message = world.fails(["train", "train.toml", "--out", "r"]);
    assert!(
        message.contains("r: is not empty; add --resume to continue the run in it, or choose another --out"),
        "{message}"
    );
    let message = world.fails(["train", "train.toml", "--out", "r", "--resume", "--set", "train.epochs=4"]);
    assert!(message.contains("it has `epochs = 3`, this run has `epochs = 4`; restore the configuration"), "{message}");
    let again = world.run(["train", "train.toml", "--out", "r", "--resume"]);
    assert!(again.stderr.contains("training: already done"), "{}", again.stderr);
    assert!(again.stdout.starts_with("12 steps"), "{}", again.stdout);
    assert_eq!(content(&world.path("r")), before);
    let message = world.fails(["train", "train.toml", "--out", "data"]);
    assert!(message.contains("data: is not empty and is not the directory of a run (no config.toml)"), "{message}");
}

#[test]
fn a_run_is_not_gone_on_with_when_model_or_data_have_changed() {
    let world = World::new();
    let fresh = |name: &str| world.ok(["train", "train.toml", "--out", name]);
    fresh("r");
    let rows = world.read("data/first/train.json");
    world.write("data/first/train.json", &rows.replacen("first of", "last of", 1));
    let message = world.fails(["train", "train.toml", "--out", "r", "--resume"]);
    assert!(message.contains("data/first/train.json has changed since the run started"), "{message}");
    world.write("data/first/train.json", &rows);
    world.ok(["train", "train.toml", "--out", "r", "--resume"]);
    std::fs::remove_dir_all(world.path("model")).unwrap();
    world.model("model", 2);
    let message = world.fails(["train", "train.toml", "--out", "r", "--resume"]);
    assert!(message.contains("r: model has changed since the run started"), "{message}");
}

#[test]
fn mistakes_are_told_before_anything_is_written() {
    let world = World::new();
    world.write("data/empty/train.json", "[]");
    world.write(
        "data/number/train.jsonl",
        "{\"prompt\": \"p\", \"answer\": \"a\"}\n{\"prompt\": \"p\", \"answer\": 5}\n",
    );
    let rows: [(&[&str], &str); 9] = [
        (&["model=nowhere"], "nowhere: not found; a model is a directory"),
        (&["data.train=nowhere"], "nowhere: not found"),
        (&["data.train=data/empty"], "data/empty/train.json: no examples"),
        (&["data.train=data/number"], "data/number/train.jsonl: row 1 (from 0): `answer` is a number, expected text"),
        (&["data.limit=0"], "data.limit = 0: expected at least 1"),
        (&["train.lora.target_modules=['q_porj']"], "`q_porj` matches no layer of the model; it has down_proj,"),
        (&["train.lora.r=0"], "train.toml: train: r = 0"),
        (&["train.learning_rat=1"], "unknown key `learning_rat` (did you mean `learning_rate`?)"),
        (&["train.epochs"], "--set train.epochs: expected key=value"),
    ];
    for (set, part) in rows {
        let set = set.iter().flat_map(|s| ["--set", s]);
        let message = world.fails(["train", "train.toml", "--out", "r"].into_iter().chain(set));
        assert!(message.contains(part), "{message}");
        assert!(!world.exists("r"), "{message}");
    }
    let wrong = ["--set", "model=nowhere", "--set", "data.train=nor/here", "--set", "data.earlier=['nor/there']"];
    let message = world.fails(["train", "train.toml", "--out", "r"].iter().chain(&wrong));
    for part in ["3 problems", "nowhere: not found", "nor/here: not found", "nor/there: not found"] {
        assert_eq!(message.matches(part).count(), 1, "{part}: {message}");
    }
    for out in ["train.toml", "train.toml/r"] {
        let message = world.fails(["train", "train.toml", "--out", out]);
        assert!(message.contains(&format!("error: {out}: ")), "{message}");
    }
    let message = world.fails(["train", "data", "--out", "r"]);
    assert!(message.contains("data: is a directory; expected a regular file"), "{message}");
}

#[test]
fn a_learning_rate_beyond_reason_is_told_before_the_run() {
    let world = World::new();
    let message = world.fails(["train", "train.toml", "--out", "r", "--set", "train.learning_rate=1e30"]);
    assert!(message.contains("learning_rate = 1") && message.contains("at most 1,000"), "{message}");
    assert!(!world.exists("r/adapter") && !world.exists("r/model"));
}

#[test]
fn paths_and_data_may_be_unusual() {
    let world = World::new();
    world.write("dätä/日本 1/train.json", r#"[{"prompt": "first of a b c d :", "answer": ""}]"#);
    world.write("dätä/long.jsonl", &json!({"prompt": "a ".repeat(300), "answer": "b ".repeat(300)}).to_string());
    world.write("dätä/nothing.json", r#"[{"prompt": "", "answer": ""}]"#);
    for (data, out) in [("dätä/日本 1", "r/ü x/"), ("dätä/long.jsonl", "./s"), ("dätä/nothing.json", "t/../u")]
    {
        std::fs::create_dir_all(world.path("t")).unwrap();
        let set = format!("data.train={data}");
        world.ok(["train", "train.toml", "--out", out, "--set", &set, "--set", "train.max_length=20"]);
        assert!(world.exists(out.trim_end_matches('/')), "{out}");
    }
    let steps = world.lines("s/log.jsonl");
    assert!(steps.iter().all(|s| s["tokens"] == 20), "{steps:?}");
}

#[test]
fn one_process_at_a_time_works_in_an_output() {
    let world = World::new();
    let long = ["train", "train.toml", "--out", "r", "--set", "train.max_steps=100000"];
    let mut first = world.command(long).stderr(std::process::Stdio::null()).spawn().unwrap();
    crate::killed::wait_for(&mut first, || world.exists("r/log.jsonl"));
    let message = world.fails(long.iter().chain(&["--resume"]));
    assert!(message.contains("r: another process is using it"), "{message}");
    first.kill().unwrap();
    first.wait().unwrap();
}
