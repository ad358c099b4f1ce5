//! Runs that are asked to stop (SIGINT, SIGTERM, SIGHUP), and files that are damaged or replaced before they resume.

use std::process::{Command, Stdio};

use cl_lab::toy;
use serde_json::{Value, json};

use crate::killed::wait_for;
use crate::world::{World, assert_same};

const LONG: [&str; 4] = ["--set", "train.epochs=60", "--set", "train.save_steps=0"];

/// Stops a command with a signal after five more lines in its log; returns its exit code and stderr.
fn stop(world: &World, args: &[&str], log: &str, signal: &str) -> (Option<i32>, String) {
    let log = world.path(log);
    let lines = || std::fs::read(&log).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count());
    let before = lines();
    let mut process = world.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&mut process, || lines() >= before + 5);
    assert!(Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap().success());
    let output = process.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_round_that_is_asked_to_stop_saves_its_state_and_goes_on_to_the_same_bytes() {
    let (left_alone, stopped) = (World::new(), World::new());
    let args = [&["train", "train.toml", "--out", "r"][..], &LONG].concat();
    left_alone.ok(&args);
    let mut resume = args.clone();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let (exit, said) = stop(&stopped, &resume, "r/log.jsonl", signal);
        assert_eq!(exit, Some(code), "{said}");
        assert!(said.contains("error: stopped after step") && said.contains("--resume"), "{said}");
        assert!(stopped.exists("r/state/manifest.json") && !stopped.exists("r/adapter"));
        resume = [&args[..], &["--resume"]].concat();
    }
    stopped.ok(&resume);
    assert_same(&left_alone.path("r"), &stopped.path("r"));
}

#[test]
fn a_sequence_that_is_asked_to_stop_goes_on() {
    let world = World::new();
    let args = [&["sequence", "lora.toml", "--out", "s"][..], &LONG].concat();
    let (exit, said) = stop(&world, &args, "s/rounds/1-first/log.jsonl", "-INT");
    assert_eq!(exit, Some(130), "{said}");
    world.ok([&args[..], &["--resume"]].concat());
}

#[test]
fn an_evaluation_that_is_asked_to_stop_keeps_its_answers_and_continues_after_them() {
    let world = World::new();
    let tasks = toy::tasks(1, 1, 40);
    let rows = json!(tasks.iter().find(|task| task.name == "first").unwrap().test);
    let rows = rows.as_array().unwrap();
    // Long enough to be stopped midway. Pairs of prompts, because equal documents are answered only once.
    let text = |row: &Value| row["prompt"].as_str().unwrap().to_owned();
    let pair = |a: &Value, b: &Value| json!({"prompt": text(a) + " " + &text(b), "answer": b["answer"]});
    let pairs: Vec<Value> = rows.iter().flat_map(|a| rows.iter().map(move |b| pair(a, b))).collect();
    world.write("data/first/test.json", &json!(pairs).to_string());
    let args = [
        "eval",
        "model",
        "--tasks",
        "first",
        "--data",
        "data",
        "--batch-sequences",
        "1",
        "--max-new-tokens",
        "3",
        "--no-cache",
        "--out",
    ];
    let (exit, said) = stop(&world, &[&args[..], &["e"]].concat(), "e/first.jsonl", "-INT");
    assert_eq!(exit, Some(130), "{said}");
    assert!(said.contains("stopped; completed responses are kept"), "{said}");
    let kept = world.lines("e/first.jsonl").len();
    assert!((5..pairs.len()).contains(&kept) && !world.exists("e/scores.json"), "{kept}");
    world.ok([&args[..], &["e"]].concat());
    world.ok([&args[..], &["whole"]].concat());
    assert_eq!(world.read("e/first.jsonl"), world.read("whole/first.jsonl"));
}

/// Changes one bit in the middle of a file.
fn flip(world: &World, file: &str) {
    let mut bytes = std::fs::read(world.path(file)).unwrap();
    let middle = bytes.len() - bytes.len() / 4;
    bytes[middle] ^= 1;
    std::fs::write(world.path(file), bytes).unwrap();
}

#[test]
fn one_flipped_bit_in_what_a_run_takes_up_again_is_refused_by_name() {
    let world = World::new();
    let args = [&["train", "train.toml", "--out", "r"][..], &LONG].concat();
    let resume = [&args[..], &["--resume"]].concat();
    stop(&world, &args, "r/log.jsonl", "-INT");
    flip(&world, "r/state/model.safetensors");
    let message = world.fails(&resume);
    assert!(message.contains("r/state") && message.contains("`model.safetensors` has changed"), "{message}");
    assert!(message.contains("remove the directory to restart the round"), "{message}");
    std::fs::remove_dir_all(world.path("r/state")).unwrap();
    world.ok(&resume);

    for file in ["r/adapter/adapter_model.safetensors", "r/model/model.safetensors"] {
        let whole = std::fs::read(world.path(file)).unwrap();
        flip(&world, file);
        let message = world.fails(&resume);
        assert!(message.contains(file) && message.contains("to create it again"), "{message}");
        std::fs::write(world.path(file), whole).unwrap();
        world.ok(&resume);
    }

    // A completed round of a sequence, from which the next one starts.
    let sequence = ["sequence", "lora.toml", "--out", "s"];
    world.ok(sequence);
    std::fs::remove_dir_all(world.path("s/rounds/2-mood")).unwrap();
    flip(&world, "s/rounds/1-first/adapter/adapter_model.safetensors");
    let message = world.fails(sequence.iter().chain(&["--resume"]));
    assert!(message.contains("s/rounds/1-first/adapter/adapter_model.safetensors: has changed"), "{message}");
}

#[test]
fn rows_are_listed_from_a_small_file_whatever_the_number_of_steps() {
    let world = World::new();
    let steps = ["--set", "train.max_steps=1000000000"];
    let (exit, _) = stop(&world, &[&["train", "train.toml", "--out", "r"][..], &steps].concat(), "r/log.jsonl", "-INT");
    assert_eq!(exit, Some(130));
    assert!(std::fs::metadata(world.path("r/rows.json")).unwrap().len() < 1000);
    let epoch = world.ok(["data", "rows", "r", "--epoch", "123456789"]);
    assert_eq!(epoch.lines().count(), 16);
    assert!(epoch.starts_with("{\"epoch\":123456789,\"position\":0,\"dataset\":\"first\",\"row\":"), "{epoch}");
    let message = world.fails(["data", "rows", "r", "--epoch", "999999999"]);
    assert!(message.contains("--epoch 999999999: the round has 250000000"), "{message}");
}
