//! Runs that are killed (SIGKILL) at arbitrary moments and resumed, compared with an undisturbed run.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::world::{World, assert_same, assert_whole};

/// Waits until something has happened, or the process has exited. The time limit only keeps a broken test from hanging.
pub fn wait_for(process: &mut Child, happened: impl Fn() -> bool) {
    let started = Instant::now();
    while !happened() && process.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(120), "nothing happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a command repeatedly, killing it at each of `moments`, checks that nothing incomplete looks complete, and
/// finally lets it finish.
fn kill_at(world: &World, args: &[&str], out: &str, moments: &[(&str, usize)]) {
    for &(file, lines) in moments {
        let path = world.path(out).join(file);
        let mut process = world.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut process, || path.exists() && (lines == 0 || line_count(&path) >= lines));
        process.kill().unwrap();
        process.wait().unwrap();
        assert_whole(&world.path(out));
    }
    world.ok(args);
}

fn line_count(path: &Path) -> usize {
    std::fs::read(path).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
}

/// Writes a configuration whose rounds are long enough to be killed midway; those that train weights also keep
/// checkpoints.
fn long(world: &World, name: &str, more: &str) {
    let text = world.read(name).replace("epochs = 3", "epochs = 10");
    let kept = if text.contains("[router]") { "" } else { "\nkeep_checkpoints = 2" };
    let text = text.replace("save_steps = 2", &format!("save_steps = 3{kept}"));
    world.write(name, &(text + more));
}

#[test]
fn a_killed_sequence_of_lora_with_replay_comes_out_as_if_it_had_not_been() {
    let (left_alone, killed) = (World::new(), World::new());
    for world in [&left_alone, &killed] {
        long(world, "lora.toml", "[replay]\nfraction = 0.5\n");
    }
    left_alone.ok(["sequence", "lora.toml", "--out", "s"]);
    let moments = [
        ("base.blake3", 0),
        ("rounds/0-base/scores/first.jsonl", 0),
        ("rounds/1-first/log.jsonl", 7),
        ("rounds/1-first/log.jsonl", 20),
        ("rounds/1-first/adapter", 0),
        ("rounds/1-first/scores/first.jsonl", 1),
        ("rounds/2-mood/log.jsonl", 11),
        ("rounds/2-mood/model", 0),
        ("rounds/2-mood/scores/mood.jsonl", 1),
    ];
    kill_at(&killed, &["sequence", "lora.toml", "--out", "s", "--resume"], "s", &moments);
    assert_same(&left_alone.path("s"), &killed.path("s"));
}

#[test]
fn a_killed_full_fine_tuning_that_keeps_the_last_model_only_comes_out_the_same_and_repeats_no_round() {
    let (left_alone, killed) = (World::new(), World::new());
    for world in [&left_alone, &killed] {
        let text = world.read("full.toml").replace("\"mood\"", "\"mood\", \"last\"");
        world.write("full.toml", &format!("keep_models = false\n{text}"));
        long(world, "full.toml", "");
    }
    left_alone.ok(["sequence", "full.toml", "--out", "s"]);
    let moments = [
        ("rounds/1-first/log.jsonl", 5),
        ("rounds/1-first/model", 0),
        ("rounds/2-mood/model", 0),
        ("rounds/2-mood/scores.json", 0),
        ("rounds/3-last/log.jsonl", 5),
        ("rounds/3-last/scores.json", 0),
    ];
    let args = ["sequence", "full.toml", "--out", "s", "--resume"];
    kill_at(&killed, &args, "s", &moments);
    assert_same(&left_alone.path("s"), &killed.path("s"));
    for (world, round) in [(&left_alone, "1-first"), (&killed, "1-first"), (&killed, "2-mood")] {
        assert!(!world.exists(&format!("s/rounds/{round}/model")));
    }
    let again = killed.run(args);
    assert_eq!(again.stderr.matches("training: already done").count(), 3, "{}", again.stderr);
    assert!(!again.stderr.contains(" steps, "), "{}", again.stderr);
    assert_same(&left_alone.path("s"), &killed.path("s"));
}

#[test]
fn a_killed_round_comes_out_as_if_it_had_not_been() {
    let (left_alone, killed) = (World::new(), World::new());
    for world in [&left_alone, &killed] {
        long(world, "train.toml", "lora_dropout = 0.1\n");
    }
    let done = left_alone.ok(["train", "train.toml", "--out", "r"]);
    let moments = [("config.toml", 0), ("log.jsonl", 4), ("state", 0), ("log.jsonl", 17), ("adapter", 0), ("model", 0)];
    let args = ["train", "train.toml", "--out", "r", "--resume"];
    kill_at(&killed, &args, "r", &moments);
    assert_same(&left_alone.path("r"), &killed.path("r"));
    let loss = |stdout: &str| stdout.split(", ").nth(1).unwrap().to_owned();
    assert_eq!(loss(&killed.ok(args)), loss(&done), "the loss is that of the whole run");
}

#[test]
fn a_killed_training_of_routers_comes_out_as_if_it_had_not_been() {
    let (left_alone, killed) = (World::new(), World::new());
    for world in [&left_alone, &killed] {
        world.model("other", 2);
        let experts = "[[experts]]\nmodel = \"model\"\n[[experts]]\nmodel = \"other\"\n";
        world.write("mix.toml", &format!("base_model = \"model\"\n{experts}"));
        world.ok(["moe", "mix", "mix.toml", "--out", "mix"]);
        let router = world.read("train.toml").replace("model = \"model\"", "model = \"mix\"");
        world.write("router.toml", &router.replace("[train.lora]\nr = 2", "[router]\nz_loss = 0.001"));
        long(world, "router.toml", "load_balancing = 0.01\n");
    }
    let done = left_alone.ok(["moe", "train-router", "router.toml", "--out", "r"]);
    assert!(done.contains("first: gates model 0.") && done.contains("mixture  r/model"), "{done}");
    assert!(left_alone.ok(["check", "router.toml"]).contains("2 routers of 2 experts, 2 for each token"));
    let moments = [
        ("config.toml", 0),
        ("log.jsonl", 4),
        ("state", 0),
        ("log.jsonl", 17),
        ("model", 0),
        ("routing.svg", 0),
        ("routing.json", 0),
    ];
    kill_at(&killed, &["moe", "train-router", "router.toml", "--out", "r", "--resume"], "r", &moments);
    assert_same(&left_alone.path("r"), &killed.path("r"));
}

#[test]
fn a_killed_evaluation_goes_on_where_it_was() {
    let (left_alone, killed) = (World::new(), World::new());
    let args =
        ["eval", "model", "--tasks", "first,mood,homes.jsonl", "--data", "data", "--out", "e", "--max-new-tokens", "3"];
    let table = left_alone.ok(args);
    kill_at(&killed, &args, "e", &[("first.jsonl", 1), ("mood.jsonl", 0), ("homes.jsonl", 0)]);
    assert_same(&left_alone.path("e"), &killed.path("e"));
    assert_eq!(killed.ok(args), table);
}

#[test]
fn a_killed_evaluation_asks_nothing_twice() {
    let world = World::new();
    // Words of the tokenizer's vocabulary, so that all questions also differ in their tokens.
    let word = |i: usize| ["a", "b", "c", "d"][i % 4];
    let query =
        |i: usize| format!("first of {} {} {} {} {}", word(i / 256), word(i / 64), word(i / 16), word(i / 4), word(i));
    let line =
        |i| format!("{{\"query\": \"{}\", \"choices\": [\"a\", \"b\", \"c\"], \"gold\": {}}}\n", query(i), i % 3);
    let questions: String = (0..400).map(line).collect();
    world.write("many.jsonl", &questions);
    let args = ["eval", "model", "--tasks", "many.jsonl", "--out", "e", "--batch-tokens", "64", "--cache", "answers"];
    let predictions = world.path("e/many.jsonl");
    for lines in [1, 40, 200] {
        let mut process = world.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut process, || line_count(&predictions) >= lines);
        process.kill().unwrap();
        process.wait().unwrap();
    }
    // With another output directory, known answers can only come from the response cache.
    let mut elsewhere = args;
    elsewhere[5] = "f";
    world.ok(args);
    let answers: Vec<String> = crate::world::content(&world.path("answers")).into_iter().map(|f| f.0).collect();
    let file = format!("answers/{}", answers[0]);
    let keys: Vec<String> = world.lines(&file).iter().map(|l| l["key"].as_str().unwrap().to_owned()).collect();
    let different: std::collections::BTreeSet<&String> = keys.iter().collect();
    assert_eq!((keys.len(), different.len()), (1200, 1200), "every question is answered once");
    world.ok(elsewhere);
    assert_eq!(world.lines(&file).len(), 1200);
    assert_eq!(world.read("e/many.jsonl"), world.read("f/many.jsonl"));
}

#[test]
fn a_killed_run_with_validation_comes_out_as_if_it_had_not_been() {
    let (left_alone, killed) = (World::new(), World::new());
    for world in [&left_alone, &killed] {
        long(world, "train.toml", "lora_dropout = 0.1\n[validation]\nfraction = 0.25\nevery = 4\n");
        long(world, "lora.toml", "[validation]\nfraction = 0.2\npatience = 2\n[replay]\nfraction = 0.5\n");
    }
    left_alone.ok(["train", "train.toml", "--out", "r"]);
    let args = ["train", "train.toml", "--out", "r", "--resume"];
    kill_at(&killed, &args, "r", &[("log.jsonl", 5), ("log.jsonl", 11), ("log.jsonl", 21), ("adapter", 0)]);
    assert_same(&left_alone.path("r"), &killed.path("r"));
    left_alone.ok(["sequence", "lora.toml", "--out", "s"]);
    let moments = [("rounds/1-first/log.jsonl", 5), ("rounds/2-mood/log.jsonl", 4), ("rounds/2-mood/adapter", 0)];
    kill_at(&killed, &["sequence", "lora.toml", "--out", "s", "--resume"], "s", &moments);
    assert_same(&left_alone.path("s"), &killed.path("s"));
}
