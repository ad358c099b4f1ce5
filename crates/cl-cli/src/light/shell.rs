//! Shell completions and man pages.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

/// Arguments of `cl completions`.
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Arguments of `cl man`.
#[derive(clap::Args)]
pub struct ManArgs {
    /// Write the man pages of `cl` and all its commands (cl-train.1, …) to this directory.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints a completion script.
pub fn completions(args: &CompletionsArgs, mut command: Command, out: &mut impl Write) -> Result<()> {
    // Written to memory first, because the generator panics on write errors.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "cl", &mut script);
    Ok(out.write_all(&script)?)
}

/// Prints the man page, or writes all man pages.
pub fn man(args: &ManArgs, command: Command, out: &mut impl Write) -> Result<()> {
    let Some(dir) = &args.out else { return Ok(clap_mangen::Man::new(command).render(out)?) };
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    clap_mangen::generate_to(command, dir).with_context(|| dir.display().to_string())
}
