//! `cl eval` and `cl sequence` as several processes.

use std::process::Command;

use cl_lab::toy;
use serde_json::{Value, json};

use crate::killed::wait_for;
use crate::ranks::{assert_alike, finish, run_ranks, start_ranks};
use crate::world::World;

/// Arguments with a small batch size, so that requests are sent in several parts.
const EVAL: [&str; 12] = [
    "eval",
    "model",
    "--tasks",
    "first,homes.jsonl",
    "--data",
    "data",
    "--max-new-tokens=3",
    "--batch-tokens=16",
    "--batch-sequences=2",
    "--no-cache",
    "--rank-timeout=60",
    "--out",
];

/// Writes a task with `documents` documents, all of them different.
fn write_pairs(world: &World, documents: usize) {
    let tasks = toy::tasks(1, 1, 40);
    let rows = json!(tasks.iter().find(|task| task.name == "first").unwrap().test);
    let rows = rows.as_array().unwrap();
    let text = |row: &Value| row["prompt"].as_str().unwrap().to_owned();
    let pair = |a: &Value, b: &Value| json!({"prompt": text(a) + " " + &text(b), "answer": b["answer"]});
    let pairs = rows.iter().flat_map(|a| rows.iter().map(move |b| pair(a, b)));
    world.write("data/first/test.json", &json!(pairs.take(documents).collect::<Vec<_>>()).to_string());
}

/// Checks that answers are the same, in the same order; log-likelihoods are f32 sums in a different order.
fn assert_same_answers(world: &World, one: &str, other: &str) {
    let (one, other) = (world.lines(one), world.lines(other));
    assert_eq!(one.len(), other.len());
    for (a, b) in one.iter().zip(&other) {
        assert_eq!((&a["request"], &a["response"]["text"]), (&b["request"], &b["response"]["text"]));
        let sums = |line: &Value| -> Vec<f64> {
            line["response"]["loglikelihoods"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
        };
        assert_eq!(sums(a).len(), sums(b).len());
        assert!(sums(a).iter().zip(sums(b)).all(|(a, b)| (a - b).abs() < 1e-4), "{a} {b}");
    }
}

#[test]
fn scores_do_not_depend_on_the_number_of_ranks() {
    let world = World::new();
    write_pairs(&world, 21);
    world.ok(["train", "train.toml", "--out", "r"]);
    let of = |out: &'static str| [&EVAL[..], &[out, "--adapter", "r/adapter", "--base"]].concat();
    let table = world.ok(of("alone"));
    for (ranks, out) in [(2, "two"), (3, "three")] {
        let outputs = run_ranks(&world, ranks, &of(out));
        assert_eq!(outputs[0].stdout, table);
        assert!(outputs[1..].iter().all(|o| o.stdout.is_empty() && o.stderr.is_empty()), "{}", outputs[1].stderr);
        for model in ["base", "r"] {
            for task in ["first", "homes"] {
                assert_same_answers(
                    &world,
                    &format!("alone/{model}/{task}.jsonl"),
                    &format!("{out}/{model}/{task}.jsonl"),
                );
            }
        }
    }
}

#[test]
fn a_signal_to_one_rank_ends_the_scoring_of_all_and_answers_are_kept() {
    let world = World::new();
    write_pairs(&world, 1600);
    let args = [&EVAL[..], &["e"]].concat();
    let mut processes = start_ranks(&world, 2, &args);
    let lines = || std::fs::read(world.path("e/first.jsonl")).map_or(0, |text| text.split(|b| *b == b'\n').count());
    wait_for(&mut processes[0], || lines() > 20);
    let id = processes[1].id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let outputs = finish(processes);
    assert_eq!(
        (outputs[0].code, outputs[1].code),
        (Some(130), Some(143)),
        "{} {}",
        outputs[0].stderr,
        outputs[1].stderr
    );
    let kept = world.lines("e/first.jsonl");
    assert!((20..1600).contains(&kept.len()) && !world.exists("e/scores.json"), "{}", kept.len());
    // A single process resumes from there.
    world.ok(&args);
    world.ok([&EVAL[..], &["whole"]].concat());
    assert_same_answers(&world, "whole/first.jsonl", "e/first.jsonl");
}

#[test]
fn a_sequence_by_several_ranks_is_that_of_one_also_when_one_was_killed() {
    let world = World::new();
    let settings = ["train.gradient_accumulation_steps=3", "train.micro_batch_size=1", "train.learning_rate=1e-4"];
    let settings = settings.map(|set| ["--set", set]).concat();
    let of = |out: &'static str, more: &[&'static str]| {
        [&["sequence", "lora.toml", "--out", out], &settings[..], more].concat()
    };
    let table = world.ok(of("alone", &[]));
    let more = ["--rank-timeout=20", "--set", "train.epochs=3"];
    let mut processes = start_ranks(&world, 2, &of("s", &more));
    let log = world.path("s/rounds/2-mood/log.jsonl");
    wait_for(&mut processes[0], || std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() > 3));
    let mut killed = processes.remove(1);
    killed.kill().unwrap();
    killed.wait().unwrap();
    let output = finish(processes).remove(0);
    assert!(output.code == Some(1) && output.stderr.contains("another rank has exited"), "{}", output.stderr);
    let outputs = run_ranks(&world, 2, &of("s", &[&more[..], &["--resume"]].concat()));
    assert!(outputs[1].stdout.is_empty() && outputs[1].stderr.is_empty(), "{}", outputs[1].stderr);
    assert_eq!(outputs[0].stdout.replace("s/rounds", "alone/rounds"), table);
    for round in ["1-first", "2-mood"] {
        let dir = |run: &str| format!("{run}/rounds/{round}");
        assert_alike(&world, &dir("alone"), &dir("s"), "adapter/adapter_model.safetensors");
        assert_same_answers(
            &world,
            &format!("{}/scores/homes.jsonl", dir("alone")),
            &format!("{}/scores/homes.jsonl", dir("s")),
        );
    }
    // Completed stages are not repeated.
    let outputs = run_ranks(&world, 2, &of("s", &[&more[..], &["--resume"]].concat()));
    assert_eq!(outputs[0].stdout.replace("s/rounds", "alone/rounds"), table);
    assert!(
        outputs[0].stderr.contains("2: mood") && !outputs[0].stderr.contains("training\n"),
        "{}",
        outputs[0].stderr
    );
}
