//! Functions to run other programs.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{root, setup};

/// Returns a `cargo` command for the workspace's root, with an environment as if it were called from a shell.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    // `cargo xtask` itself runs under cargo, which set these variables for this process. If they were passed on, they
    // would override the current configuration, and build scripts would detect a change.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "LD_LIBRARY_PATH"].contains(&&*text)
        {
            command.env_remove(&name);
        }
    }
    if setup::exported_libtorch().is_none() {
        command.env_remove("LIBTORCH");
    }
    command
}

/// Runs a command in this process's terminal.
pub fn run(mut command: Command) -> Result<()> {
    // Do not use Debug, which lists every removed variable.
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let name = words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// Runs a step of a longer list, and prints how long it took.
pub fn step(name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("== {name}");
    let started = Instant::now();
    body().with_context(|| name.to_owned())?;
    eprintln!("== {name}: {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}
