//! `cl` does not link libtorch, and reports a missing `cl-engine`.

use std::path::Path;
use std::process::Command;

/// Whether a program lists libtorch among the libraries that it loads.
fn loads_libtorch(program: &str) -> bool {
    let bytes = std::fs::read(program).unwrap();
    bytes.windows(b"libtorch_cpu.so".len()).any(|window| window == b"libtorch_cpu.so")
}

#[test]
fn cl_links_no_libtorch() {
    assert!(!loads_libtorch(env!("CARGO_BIN_EXE_cl")));
    assert!(loads_libtorch(env!("CARGO_BIN_EXE_cl-engine")), "the test looks for the wrong name");
}

#[test]
fn both_programs_have_the_same_commands() {
    let help = |program: &str| Command::new(program).arg("--help").output().unwrap().stdout;
    let engine = help(env!("CARGO_BIN_EXE_cl-engine"));
    assert!(engine.windows(9).any(|w| w == b"reproduce"));
    assert_eq!(help(env!("CARGO_BIN_EXE_cl")), engine);
}

#[test]
fn without_the_engine_light_commands_work_and_others_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let cl = folder.path().join("cl");
    std::fs::copy(env!("CARGO_BIN_EXE_cl"), &cl).unwrap();
    let run = |args: &[&str]| Command::new(&cl).args(args).output().unwrap();
    assert!(run(&["paper-tables"]).status.success());
    let output = run(&["train", "config.toml", "--out", "run"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("cl-engine: no such file") && stderr.contains("install both"), "{stderr}");
    assert!(!Path::new("run").exists());
}
