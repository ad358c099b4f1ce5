//! The checks that every change must pass.

use anyhow::{Result, bail};

use crate::command::{cargo, run, step};
use crate::{setup, tidy};

/// Runs all tests.
pub fn test(arguments: &[String]) -> Result<()> {
    setup::run()?;
    let mut command = cargo(&["test", "--workspace"]);
    command.args(arguments);
    run(command)
}

/// Reproduces the paper's tables and figures with a small model.
pub fn reproduce(arguments: &[String]) -> Result<()> {
    setup::run()?;
    let mut command =
        cargo(&["run", "--quiet", "--release", "--package", "cl-cli", "--bin", "cl-engine", "--", "reproduce"]);
    eprintln!("building the cl command (a few minutes the first time)");
    command.args(arguments);
    run(command)
}

/// Runs all checks.
pub fn all(arguments: &[String]) -> Result<()> {
    let with_tests = match arguments {
        [] => true,
        [one] if one == "--no-test" => false,
        other => bail!("unknown arguments {other:?}; expected none, or --no-test"),
    };
    step("setup", || setup::run().map(|_| ()))?;
    step("tidy", tidy::run)?;
    step("format", || run(cargo(&["fmt", "--all", "--check"])))?;
    step("clippy", || run(cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])))?;
    step("documentation", || {
        let mut doc = cargo(&["doc", "--quiet", "--workspace", "--no-deps"]);
        doc.env("RUSTDOCFLAGS", "-D warnings");
        run(doc)
    })?;
    if with_tests {
        step("test", || run(cargo(&["test", "--workspace"])))?;
    }
    Ok(())
}
