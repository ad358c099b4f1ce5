use std::fs::File;
use std::process::Stdio;

use crate::world::{CommandOutput, World};

#[test]
fn help_names_every_argument() {
    let world = World::new();
    let rows: [(&[&str], &[&str]); 12] = [
        (
            &[],
            &[
                "import-gguf",
                "generate",
                "train",
                "sequence",
                "eval",
                "score",
                "check",
                "reproduce",
                "paper-tables",
                "Examples",
                "--threads <N>",
            ],
        ),
        (&["import-gguf"], &["<FILE>", "<OUT>", "--dtype", "--overwrite"]),
        (
            &["generate"],
            &[
                "<MODEL>",
                "--prompt",
                "--adapter",
                "--max-new-tokens",
                "--precision",
                "--device",
                "--ids",
                "[default: 64]",
            ],
        ),
        (&["train"], &["<CONFIG>", "--out", "--set <KEY=VALUE>", "--resume"]),
        (&["sequence"], &["<CONFIG>", "--out", "--set <KEY=VALUE>", "--resume"]),
        (&["eval"], &["<MODEL>", "--tasks", "--data", "--out", "--adapter", "--limit", "--precision", "gsm8k_cot"]),
        (&["eval", "compare"], &["<RUN1>", "<RUN2>", "--resamples", "--seed", "--level", "--json"]),
        (&["score"], &["<PREDICTIONS>", "--metric", "--json"]),
        (&["check"], &["<PATH>", "--set"]),
        (&["reproduce"], &["--out", "--seed", "target/reproduce", "--profile", "smol", "--limit"]),
        (&["report"], &["[NAME=]RUN", "--out", "--old"]),
        (&["paper-tables"], &["--flagged"]),
    ];
    for (command, parts) in rows {
        let help = world.ok(command.iter().chain(&["--help"]));
        for part in parts {
            assert!(help.contains(part), "{command:?}: {part} is not in\n{help}");
        }
    }
    assert!(world.ok(["--version"]).starts_with("cl 0."));
}

#[test]
fn wrong_arguments_exit_with_2_and_say_which() {
    let world = World::new();
    let rows: [(&[&str], &str); 8] = [
        (&[], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["generate", "model"], "--prompt"),
        (&["generate", "model", "--prompt", "a", "--max-new-tokens", "many"], "many"),
        (&["generate", "model", "--prompt", "a", "--precision", "f64"], "f32, bf16"),
        (&["sequence", "lora.toml"], "--out"),
        (&["eval", "model", "--data", "data", "--out", "e"], "--tasks"),
        (&["reproduce", "--seed", "18446744073709551615"], "--seed"),
    ];
    for (args, part) in rows {
        let run = world.run(args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(part), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn a_reader_that_stops_reading_is_no_error_and_a_full_disk_is_one() {
    let world = World::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let run = CommandOutput::of(world.command(["paper-tables"]).stdout(writer));
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    let full = File::options().write(true).open("/dev/full").unwrap();
    let run = CommandOutput::of(world.command(["paper-tables"]).stdout(full));
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.starts_with("error: cannot write to standard output: No space left"), "{}", run.stderr);
}

#[test]
fn closed_progress_does_not_stop_a_run() {
    let world = World::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = world.command(["train", "train.toml", "--out", "r"]);
    let output = command.stderr(writer).stdout(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(world.exists("r/model/manifest.json"));
}

#[test]
fn the_paper_tables_need_nothing() {
    let world = World::new();
    let all = world.ok(["paper-tables"]);
    let flagged = world.ok(["paper-tables", "--flagged"]);
    assert!(all.lines().count() > flagged.lines().count());
    assert!(flagged.contains("is printed in the adjacent column"), "{flagged}");
}

#[test]
fn shells_and_man_know_every_command() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = world.ok(["completions", shell]);
        assert!(script.contains("sequence") && script.contains("chat"), "{shell}");
    }
    assert!(world.ok(["man"]).contains(".TH cl 1"));
    world.ok(["man", "--out", "pages"]);
    assert!(world.read("pages/cl-sequence.1").contains("resume"));
}

#[test]
fn the_papers_study_is_planned_with_nothing_at_hand() {
    let world = World::new();
    let plan = world.ok(["reproduce", "--profile", "paper", "--dry-run", "--only", "sequence-lora.seed"]);
    let sequence = plan.lines().find(|line| line.contains("sequence-lora.seed42")).unwrap();
    // 6 × 780 + 6 × 3,085 steps.
    assert!(sequence.starts_with("to do") && sequence.contains(" 23190 "), "{plan}");
    assert!(plan.contains("model and data are not read") && plan.contains("operations per second on a GPU"), "{plan}");
    for (args, part) in [
        (&["reproduce", "--profile", "smol", "--dry-run"][..], "--profile smol needs --model DIR and --data DIR"),
        (&["reproduce", "--profile", "paper"], "--profile paper needs --model DIR and --data DIR"),
        (&["reproduce", "--model", "m"], "--model is for --profile smol"),
        (&["reproduce", "--profile", "paper", "--quick"], "--quick is for --profile tiny"),
    ] {
        let message = world.fails(args);
        assert!(message.contains(part), "{message}");
    }
}
