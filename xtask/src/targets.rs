//! Checks the light crates for other systems.

use anyhow::{Context, Result, bail};

use crate::command::{cargo, run};
use crate::tidy::LIGHT;

/// Systems other than Linux that the light crates support, as rustup names them.
const TARGETS: [&str; 3] = ["x86_64-pc-windows-gnu", "x86_64-apple-darwin", "aarch64-apple-darwin"];

/// Runs `cargo check` of the light crates and their commands for every target that rustup has installed.
///
/// Checking does not link, so no C compiler for the target is needed; build scripts use `true` instead.
pub fn check(arguments: &[String]) -> Result<()> {
    if !arguments.is_empty() {
        bail!("unknown arguments {arguments:?}; expected none");
    }
    let listed = std::process::Command::new("rustup").args(["target", "list", "--installed"]).output();
    let installed = String::from_utf8(listed.context("cannot run rustup")?.stdout)?;
    for target in TARGETS {
        if !installed.lines().any(|line| line == target) {
            eprintln!("{target}: skipped; install it by `rustup target add {target}`");
            continue;
        }
        let mut command = cargo(&["check", "--quiet", "--locked", "--target", target]);
        for name in LIGHT {
            command.args(["--package", name]);
        }
        command.args(["--features", "cl-checkpoint/logging,cl-checkpoint/signals,cl-eval/cli,cl-merge/cli,cl-moe/cli"]);
        let name = target.replace('-', "_");
        for tool in ["CC", "CXX", "AR"] {
            let variable = format!("{tool}_{name}");
            if std::env::var_os(&variable).is_none() {
                command.env(variable, "true");
            }
        }
        run(command)?;
        eprintln!("{target}: checked");
    }
    Ok(())
}
