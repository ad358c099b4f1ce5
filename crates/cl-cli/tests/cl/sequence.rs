use std::collections::BTreeSet;

use serde_json::Value;

use crate::world::{CommandOutput, World, assert_same, content};

#[test]
fn a_sequence_of_lora_leaves_what_is_documented() {
    let world = World::new();
    let run = world.run(["sequence", "lora.toml", "--out", "s"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let names: Vec<String> = content(&world.path("s")).into_iter().map(|f| f.0).collect();
    let scores = ["scores.json", "scores/first.jsonl", "scores/homes.jsonl", "scores/mood.jsonl"];
    let round = [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/manifest.json",
        "log.jsonl",
        "model/config.json",
        "model/manifest.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "rows.json",
    ];
    let mut expected: Vec<String> =
        ["base.blake3", "config.toml", "data.blake3", "matrix.json", "tables.md"].map(str::to_owned).to_vec();
    expected.extend(scores.map(|f| format!("rounds/0-base/{f}")));
    for dir in ["1-first", "2-mood"] {
        expected.extend(round.iter().chain(&scores).map(|f| format!("rounds/{dir}/{f}")));
    }
    expected.sort();
    assert_eq!(names, expected);

    let matrix = world.json("s/matrix.json");
    assert_eq!(matrix["rows"], serde_json::json!(["base", "LoRA 1", "LoRA 1,2"]));
    let columns: Vec<(&str, &str, Option<u64>)> = matrix["columns"].as_array().unwrap().iter().map(column).collect();
    assert_eq!(columns, [("first", "new", Some(1)), ("mood", "new", Some(2)), ("homes", "old", None)]);
    let cell = |row: usize, column: usize| matrix["scores"][row][column].as_f64().unwrap();
    for (row, round) in ["0-base", "1-first", "2-mood"].iter().enumerate() {
        let scores = world.json(&format!("s/rounds/{round}/scores.json"));
        for column in 0..3 {
            let main = scores[column]["main_metric"].as_str().unwrap();
            assert_eq!(scores[column]["metrics"][main].as_f64().unwrap(), cell(row, column), "{round} {column}");
        }
    }
    assert!(run.stdout.contains("LoRA 1,2") && run.stdout.ends_with("model s/rounds/2-mood/model\n"), "{}", run.stdout);
    assert!(world.read("s/tables.md").contains("| LoRA 1,2 |"));
    for part in ["round 0: scoring the base model", "round 2 of 2: mood", "  scored homes: 6 documents"] {
        assert!(run.stderr.contains(part) && !run.stdout.contains(part), "{part}: {}", run.stderr);
    }
}

fn column(column: &Value) -> (&str, &str, Option<u64>) {
    (column["name"].as_str().unwrap(), column["group"].as_str().unwrap(), column["round"].as_u64())
}

#[test]
fn all_weights_without_adapters() {
    let world = World::new();
    let stdout = world.ok(["sequence", "full.toml", "--out", "s"]);
    assert!(stdout.contains("FFT 1,2"), "{stdout}");
    assert!(world.exists("s/rounds/1-first/model/model.safetensors") && !world.exists("s/rounds/1-first/adapter"));
}

#[test]
fn replayed_rows_are_written_down_and_drawn_anew_each_epoch() {
    let world = World::new();
    let stdout = world.ok(["sequence", "lora.toml", "--out", "s", "--set", "replay.fraction=0.25"]);
    assert!(stdout.contains("LoRA-Rep 1,2"), "{stdout}");
    let first = world.rows("s/rounds/1-first");
    assert!(first.len() == 3 * 16 && first.iter().all(|r| r["dataset"] == "first"), "nothing to replay yet");
    let second = world.rows("s/rounds/2-mood");
    let drawn = |dataset: &str, epoch: u64| -> BTreeSet<u64> {
        let of_epoch = second.iter().filter(|r| r["dataset"] == dataset && r["epoch"] == epoch);
        of_epoch.map(|r| r["row"].as_u64().unwrap()).collect()
    };
    let epochs: Vec<BTreeSet<u64>> = (0..3).map(|e| drawn("first", e)).collect();
    assert!(epochs.iter().all(|e| e.len() == 4) && epochs.iter().collect::<BTreeSet<_>>().len() > 1, "{epochs:?}");
    assert!((0..3).all(|e| drawn("mood", e).len() == 16));
    // 16 rows, and 4 rows of the first task, in micro-batches of 4.
    assert_eq!(world.lines("s/rounds/2-mood/log.jsonl").len(), 3 * 5);
}

/// libtorch splits its sums into blocks and its matrix products by rows, not by threads. On the machines tested so far,
/// one and two threads give identical bits, also for SmolLM2-135M, with LoRA and with full fine-tuning.
#[test]
fn the_same_configuration_gives_the_same_bytes_for_any_number_of_threads() {
    for config in ["lora.toml", "full.toml"] {
        let worlds = ["1", "2"].map(|threads| {
            let world = World::new();
            let mut command = world.command(["sequence", config, "--out", "s", "--set", "replay.fraction=0.5"]);
            let run = CommandOutput::of(command.env("OMP_NUM_THREADS", threads).env("RAYON_NUM_THREADS", threads));
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            world
        });
        assert_same(&worlds[0].path("s"), &worlds[1].path("s"));
    }
}

#[test]
fn a_second_run_into_the_same_output_needs_resume_and_the_same_configuration() {
    let world = World::new();
    world.ok(["sequence", "lora.toml", "--out", "s"]);
    let before = content(&world.path("s"));
    let message = world.fails(["sequence", "lora.toml", "--out", "s"]);
    assert!(message.contains("s: is not empty; add --resume"), "{message}");
    let message = world.fails(["sequence", "lora.toml", "--out", "s", "--resume", "--set", "train.lora.r=3"]);
    assert!(
        message.contains(
            "it has `r = 2`, this run has `r = 3`; restore the configuration to resume it, or choose another --out"
        ),
        "{message}"
    );
    let message = world.fails(["sequence", "lora.toml", "--out", "s", "--resume", "--set", "replay.fraction=0.5"]);
    assert!(message.contains("this run has `[replay]`, it does not"), "{message}");
    let again = world.run(["sequence", "lora.toml", "--out", "s", "--resume"]);
    assert_eq!(again.stderr.matches("scoring: already done").count(), 3, "{}", again.stderr);
    assert_eq!(content(&world.path("s")), before);
}

#[test]
fn scores_are_taken_again_when_the_tests_have_changed() {
    let world = World::new();
    world.ok(["sequence", "lora.toml", "--out", "s"]);
    let tests = world.read("data/mood/test.json");
    world.write("data/mood/test.json", &tests.replacen("mood of", "first of", 1));
    let again = world.run(["sequence", "lora.toml", "--out", "s", "--resume"]);
    assert_eq!((again.code, again.stderr.matches("scored mood").count()), (Some(0), 3), "{}", again.stderr);
    assert!(!again.stderr.contains(" steps, "), "{}", again.stderr);
}

#[test]
fn mistakes_are_told_before_anything_is_written() {
    let world = World::new();
    world.write("data/no_test/train.json", r#"[{"prompt": "p", "answer": "a"}]"#);
    let rows: [(&str, &str); 8] = [
        ("data=nowhere", "nowhere: "),
        ("tasks=['first', 'no_test']", "data/no_test: no test.json"),
        ("tasks=['first', '../data']", "tasks: `../data` is not a valid directory name"),
        ("tasks=['first', 'first']", "tasks: `first` occurs again as entry 2"),
        ("eval.old=['nowhere.jsonl']", "data/nowhere.jsonl: not found"),
        ("eval.old=['homes.jsonl', 'data/homes.jsonl']", "task `homes`: listed twice"),
        ("limit.test=0", "limit.test = 0: expected at least 1"),
        ("eval.max_new_tokens=64", "64 new tokens leave no room for a prompt in the model's context of 64 tokens"),
    ];
    for (set, part) in rows {
        let message = world.fails(["sequence", "lora.toml", "--out", "s", "--set", set]);
        assert!(message.contains(part), "{set}: {message}");
        assert!(!world.exists("s"), "{set}");
    }
    for out in ["lora.toml", "lora.toml/s"] {
        let message = world.fails(["sequence", "lora.toml", "--out", out]);
        assert!(message.contains(&format!("error: {out}: ")), "{message}");
    }
}

#[test]
fn a_study_does_not_settle_where_something_else_is() {
    let world = World::new();
    let message = world.fails(["reproduce", "--out", "."]);
    assert!(message.contains(".: is not empty and is not the directory of a study (no study.json)"), "{message}");
}

#[test]
fn a_group_of_tasks_is_one_column() {
    let world = World::new();
    world.write(
        "data/letters.toml",
        r#"
name = "letters"
metric = "acc"
files.eval = ["letters"]
[multiple_choice]
context = "first of {{ words }} :"
choices = ["a", "b"]
gold = "gold"
[group]
field = "kind"
[group.members]
all = ["short", "long"]
"#,
    );
    let row = |words: &str, gold: usize, kind: &str| {
        format!("{{\"words\": \"{words}\", \"gold\": {gold}, \"kind\": \"{kind}\"}}\n")
    };
    let rows = [row("a b", 0, "short"), row("b a", 1, "short"), row("a b c d", 0, "long"), row("b", 1, "long")];
    world.write("data/letters.jsonl", &rows.concat());
    let config = world.read("lora.toml").replace("homes.jsonl", "letters.toml");
    world.write("lora.toml", &config);
    world.ok(["sequence", "lora.toml", "--out", "s"]);
    assert!(world.read("s/tables.md").contains("letters"), "{}", world.read("s/tables.md"));
    for part in ["short", "long"] {
        assert_eq!(world.lines(&format!("s/rounds/1-first/scores/letters_{part}.jsonl")).len(), 2);
    }
    let again = world.run(["sequence", "lora.toml", "--out", "s", "--resume"]);
    assert!(again.stderr.contains("scoring: already done"), "{}", again.stderr);
}

#[test]
fn finished_runs_are_one_table() {
    let world = World::new();
    world.ok(["sequence", "lora.toml", "--out", "s"]);
    let model = "s/rounds/1-first/model";
    world.ok(["eval", model, "--tasks", "first,homes.jsonl", "--data", "data", "--out", "e", "--max-new-tokens", "2"]);
    let table = world.ok(["table", "LoRA=s", "one=e", "--format", "csv"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split(',').collect()).collect();
    assert!(rows[0].contains(&"first") && rows[0].contains(&"AVall"), "{table}");
    assert_eq!(rows[1..4].iter().map(|row| row[0]).collect::<Vec<_>>(), ["base", "LoRA", "one"]);
    // The other run was not evaluated on the sequence's second task, so it has no average of new knowledge.
    let column = |name: &str| rows[0].iter().position(|c| *c == name).unwrap();
    assert_eq!((rows[3][column("mood")], rows[3][column("AVnew")]), ("–", "–"));
    assert!(rows[2][column("AVnew")].parse::<f64>().is_ok(), "{table}");
    let message = world.fails(["table", "data"]);
    assert!(message.contains("data/scores.json"), "{message}");
}
