//! Running other programs.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{root, setup};

/// `cargo` in the workspace's root, with an environment as if it was called from a shell.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    // `cargo xtask` itself ran under cargo, which set these for this process; passed on they would override what the
    // configuration says by now, and make build scripts think that something changed.
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

/// Runs a command with this process's terminal.
pub fn run(mut command: Command) -> Result<()> {
    // Not Debug, which lists every variable that was taken away.
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let name = words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// Runs a step of a longer list and says how long it took.
pub fn step(name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("== {name}");
    let started = Instant::now();
    body().with_context(|| name.to_owned())?;
    eprintln!("== {name}: {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}
