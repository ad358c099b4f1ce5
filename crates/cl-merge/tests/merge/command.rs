//! The command line, tested through the functions that the binary calls.

#![cfg(feature = "cli")]

use std::path::Path;

use cl_checkpoint::Interrupt;
use cl_merge::cli::{Command, run};
use clap::Parser;

use super::fixtures;
use super::models::Llama;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Returns the output of a command line, or its error.
pub(super) fn call(arguments: &[&str]) -> Result<String, String> {
    let cli = Cli::try_parse_from([&["cl-merge"], arguments].concat()).map_err(|e| e.to_string())?;
    let mut out = Vec::new();
    let result = run(&cli.command, &Interrupt::default(), &mut out);
    let text = String::from_utf8(out).unwrap();
    result.map(|()| text.clone()).map_err(|e| format!("{text}{e:#}"))
}

pub(super) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn dry_run_run_verify_and_diff() {
    let folder = tempfile::tempdir().unwrap();
    let (base, models) = Llama::default().family(folder.path(), 2);
    let config = folder.path().join("merge.toml");
    let text = format!(
        "base_model = {base:?}\n[method.ties]\ndensity = 0.5\n[[models]]\nmodel = {:?}\n[[models]]\nmodel = {:?}\n",
        models[0], models[1]
    );
    std::fs::write(&config, text).unwrap();
    let out = folder.path().join("out");
    let told = call(&["run", path(&config), "--dry-run"]).unwrap();
    for part in ["ties, Yadav", "3 models", "20 tensors of BF16", "memory", "time", "no problems found"] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    assert!(!out.exists());
    assert!(call(&["run", path(&config)]).unwrap_err().contains("--out"));
    assert!(call(&["run", path(&config), "--out", path(&out), "--memory", "1MB"]).unwrap_err().contains("not enough"));
    assert!(call(&["run", path(&config), "--out", path(&out), "--memory", "many"]).is_err());
    let told = call(&["run", path(&config), "--out", path(&out), "--threads", "2", "--hash-inputs"]).unwrap();
    assert!(told.contains("20 tensors"), "{told}");
    assert!(call(&["run", path(&config), "--out", path(&out)]).unwrap_err().contains("exists"));
    assert!(call(&["verify", path(&out)]).unwrap().contains("no problems found"));
    let diff = call(&["diff", path(&models[0]), path(&out), "--base", path(&base)]).unwrap();
    assert!(
        diff.lines().count() == 22 && diff.contains("cosine") && diff.lines().last().unwrap().starts_with("all"),
        "{diff}"
    );
    let json = call(&["diff", path(&out), path(&out), "--json"]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json["total"]["norm_diff"].as_f64(), json["total"]["cosine"].as_f64()), (Some(0.0), Some(1.0)));
    // Change one byte.
    let weights = out.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let error = call(&["verify", path(&out)]).unwrap_err();
    assert!(error.contains("has changed since it was written") && error.contains("1 problem found"), "{error}");
    assert!(call(&["verify", path(&models[0])]).is_ok() && call(&["verify", path(folder.path())]).is_err());
}

#[test]
fn methods_are_listed_with_their_parameters() {
    let all = call(&["methods"]).unwrap();
    for info in cl_merge::METHODS {
        assert!(all.contains(&format!("\n{}: ", info.name)) || all.starts_with(info.name), "{}", info.name);
    }
    let one = call(&["methods", "ties"]).unwrap();
    assert!(one.contains("2306.01708") && one.contains("election") && !one.contains("slerp"), "{one}");
    assert!(call(&["methods", "tiez"]).unwrap_err().contains("tiez"));
}

/// The command accepts a merge file of mergekit.
#[test]
fn yaml_is_taken_by_its_ending() {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixtures().join("mergekit/ties.yaml")).unwrap();
    let config = folder.path().join("ties.yml");
    std::fs::write(&config, text.replace("models/", &format!("{}/", fixtures().join("models").display()))).unwrap();
    let out = folder.path().join("out");
    assert!(call(&["run", path(&config), "--out", path(&out)]).unwrap().contains("20 tensors"));
    std::fs::write(&config, "merge_method: linear\nmodels: []\nmodules: {}\n").unwrap();
    assert!(call(&["run", path(&config), "--out", path(&out)]).unwrap_err().contains("modules"));
}

/// A dry run also checks later stages, and a run prints its notes as warnings.
#[test]
fn later_stages_and_warnings() {
    let folder = tempfile::tempdir().unwrap();
    let (_, models) = Llama::default().family(folder.path(), 2);
    let config = folder.path().join("merge.yaml");
    let write = |last: &str| {
        let text = format!(
            "name: pair\nmerge_method: linear\nmodels:\n  - {{model: {}, parameters: {{weight: 1, density: 1}}}}\n  \
             - {{model: {}, parameters: {{weight: 1}}}}\n---\nmerge_method: {last}\nbase_model: pair\nmodels: [{{model: {}}}]\n",
            path(&models[0]),
            path(&models[1]),
            path(&models[0])
        );
        std::fs::write(&config, text).unwrap();
    };
    write("tiess");
    let error = call(&["run", path(&config), "--dry-run"]).unwrap_err();
    assert!(error.contains("stage result: no method is called `tiess`"), "{error}");
    write("ties");
    let told = call(&["run", path(&config), "--dry-run"]).unwrap();
    for part in ["note    `density` has no effect with linear", "result: uses the result of stage pair", "no problems"]
    {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cl-merge"));
    let output = command.args(["run", path(&config), "--out"]).arg(folder.path().join("out")).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("warning: `density` has no effect with linear").count(), 1, "{text}");
}
