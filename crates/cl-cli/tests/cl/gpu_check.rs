use std::path::Path;
use std::process::Command;

use crate::world::CommandOutput;

/// Runs the GPU check on the CPU, limited to the rows that only need PyTorch.
#[test]
fn the_check_of_a_gpu_runs_on_the_cpu() {
    let python = std::env::var("CL_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    // Cargo's library path contains a different libtorch than this Python uses.
    let command = || {
        let mut command = Command::new(&python);
        command.env_remove("LD_LIBRARY_PATH");
        command
    };
    let import = "import torch; assert torch.__version__.split('+')[0] == '2.11.0'";
    if !command().args(["-c", import]).output().is_ok_and(|o| o.status.success()) {
        eprintln!("left out: no PyTorch 2.11.0; set CL_PYTHON to a Python that has it");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask/src/gpu_check.py");
    let check = |engine: &str, checks: &str| {
        let mut command = command();
        command.arg(&script).args(["--device", "cpu", "--small", "--engine", engine, "--only", checks]);
        let output = CommandOutput::of(command.arg("--out").arg(out.path()));
        let rows = std::fs::read_to_string(out.path().join("results.jsonl")).unwrap();
        let rows: Vec<serde_json::Value> = rows.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        (output, rows)
    };
    let (output, rows) = check(env!("CARGO_BIN_EXE_cl-engine"), "environment,load,logits,gradients,rate");
    assert_eq!((output.code, rows.len()), (Some(0), 7), "{}{}", output.stdout, output.stderr);
    assert!(rows.iter().all(|r| r["status"] == "ok"), "{}", output.stdout);
    // bf16 rounds, so equal results would mean that it was not used.
    let difference = |name: &str| rows.iter().find(|r| r["check"] == name).unwrap()["difference"].as_f64().unwrap();
    assert!(difference("logits, bf16") > 0.0 && difference("gradients, bf16") > 0.0, "{}", output.stdout);

    let (output, rows) = check("nowhere/cl-engine", "load");
    assert_eq!((output.code, rows[0]["status"].as_str()), (Some(1), Some("failed")));
    assert!(output.stdout.contains("nowhere/cl-engine: no such file"), "{}", output.stdout);
}
