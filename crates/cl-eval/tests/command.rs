//! The command as a user runs it: what it prints, and its exit codes.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn cl_eval(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cl-eval")).args(arguments).output().unwrap()
}

/// Returns what a command prints; it must succeed.
fn told(arguments: &[&str]) -> String {
    let output = cl_eval(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the error message of a command that must fail with this exit code.
fn failure(code: i32, arguments: &[&str]) -> String {
    let output = cl_eval(arguments);
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn prediction(document: usize, answer: &str, reference: &str) -> String {
    format!(
        r#"{{"document":{document},"task":"FOMC","metric":"first_char","request":"{document}","response":{{"text":"{answer}"}},"#
    ) + &format!(r#""target":{{"reference":{{"reference":"{reference}"}}}},"scores":{{}}}}"#)
        + "\n"
}

/// Writes two runs of forty documents: the first is correct on 20, the second on 30, which include 15 of the first's.
fn runs(folder: &Path) -> [std::path::PathBuf; 2] {
    [0..20, 5..35].map(|right| {
        let dir = folder.join(right.len().to_string());
        std::fs::create_dir(&dir).unwrap();
        let lines: String =
            (0..40).map(|i| prediction(i, if right.contains(&i) { "B. it" } else { "A" }, "B")).collect();
        std::fs::write(dir.join("FOMC.jsonl"), lines).unwrap();
        std::fs::write(dir.join("scores.json"), "[]").unwrap();
        dir
    })
}

#[test]
fn scores_come_from_the_files_alone() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = runs(folder.path());
    let table = told(&["score", text(&a), text(&b.join("FOMC.jsonl"))]);
    let rows: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert!(rows.contains(&vec!["FOMC", "first_char*", "0.5000", "0.0801", "40"]), "{table}");
    assert!(rows.contains(&vec!["FOMC", "first_char*", "0.7500", "0.0693", "40"]), "{table}");
    let json: Value = serde_json::from_str(&told(&["score", text(&a), "--json"])).unwrap();
    assert_eq!((&json[0]["metrics"]["first_char"], &json[0]["metrics"]["exact_match"]), (&0.5.into(), &0.0.into()));
    let other: Value = serde_json::from_str(&told(&["score", text(&a), "--json", "--metric", "rouge_l"])).unwrap();
    assert_eq!(other[0]["main_metric"], "rouge_l");
    assert!(failure(1, &["score", text(&a), "--metric", "acc"]).contains("no choices"));
    assert!(failure(1, &["score", text(&a), "--metric", "sari"]).contains("without a source"));
    assert!(failure(2, &["score", text(&a), "--metric", "bleu"]).contains("rouge_l"));
}

#[test]
fn two_runs_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = runs(folder.path());
    let table = told(&["compare", text(&a), text(&b), "--resamples", "500"]);
    let row: Vec<&str> = table.lines().find(|l| l.contains("first_char*")).unwrap().split_whitespace().collect();
    assert_eq!(row[..6], ["FOMC", "first_char*", "40", "0.5000", "0.7500", "+0.2500"], "{table}");
    assert_eq!(row[8..], ["5", "15", "0.0414"], "{table}");
    assert_eq!(table, told(&["compare", text(&a), text(&b), "--resamples", "500"]));
    let json = |seed: &str| told(&["compare", text(&a), text(&b), "--json", "--level", "0.9", "--seed", seed]);
    let comparison: Value = serde_json::from_str(&json("7")).unwrap();
    assert_eq!(comparison["overall"]["difference"]["value"], 0.25);
    assert_eq!(comparison["resampling"]["level"], 0.9);
    assert_ne!(json("7"), json("8"));
}

#[test]
fn files_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = runs(folder.path());
    let file = folder.path().join("rubbish.jsonl");
    for bytes in [&b"\x00\xff\xfe"[..], b"{}\n", b"[1]\n", b"\n", "\u{feff}".as_bytes()] {
        std::fs::write(&file, bytes).unwrap();
        let message = failure(1, &["score", text(&file)]);
        assert!(message.starts_with("error: ") && message.contains("line 1 is not a prediction"), "{message}");
        assert!(failure(1, &["compare", text(&a), text(&file)]).contains("rubbish.jsonl"));
    }
    std::fs::write(&file, "").unwrap();
    assert!(failure(1, &["score", text(&file)]).contains("no documents"));
    // A damaged line in the middle is an error; a truncated last line, left by a kill, is ignored.
    let whole = std::fs::read_to_string(a.join("FOMC.jsonl")).unwrap();
    std::fs::write(&file, whole.replacen("\"document\":3,", "\"document\":x,", 1)).unwrap();
    assert!(failure(1, &["score", text(&file)]).contains("line 4"));
    std::fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    assert!(told(&["score", text(&file)]).contains("39"));
    assert!(told(&["compare", text(&b), text(&file)]).contains("documents only in run 1: 1"));
    let missing = folder.path().join("missing");
    assert!(failure(1, &["score", text(&missing)]).contains("missing"));
    assert!(failure(1, &["compare", text(&a), text(&missing)]).contains("missing"));
    std::fs::create_dir(&missing).unwrap();
    assert!(failure(1, &["score", text(&missing)]).contains("no predictions files"));
    std::fs::write(&file, whole.replacen("\"reference\":\"B\"", "\"reference\":\"C\"", 1)).unwrap();
    assert!(failure(1, &["compare", text(&a), text(&file)]).contains("different targets"));
}

#[test]
fn command_lines_that_mean_nothing() {
    for arguments in [
        &[][..],
        &["score"],
        &["compare", "a"],
        &["compare", "a", "b", "--level", "1"],
        &["compare", "a", "b", "--level", "NaN"],
        &["compare", "a", "b", "--resamples", "0"],
        &["compare", "a", "b", "--seed", "-1"],
        &["guess"],
    ] {
        assert!(!failure(2, arguments).is_empty());
    }
    assert!(told(&["--help"]).contains("compare"));
}
