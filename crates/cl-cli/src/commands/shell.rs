//! What a shell and `man` know of the command.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

/// Arguments of `cl completions`.
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell to complete in.
    shell: Shell,
}

/// Arguments of `cl man`.
#[derive(clap::Args)]
pub struct ManArgs {
    /// Write a page for `cl` and one for each of its commands (cl-train.1, …) into this directory instead of one to stdout.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints a script that completes the command's arguments.
pub fn completions(args: &CompletionsArgs, mut command: Command, out: &mut impl Write) -> Result<()> {
    // The generator panics where it cannot write; a closed pipe is no reason to.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "cl", &mut script);
    Ok(out.write_all(&script)?)
}

/// Prints the manual page, or writes all of them.
pub fn man(args: &ManArgs, command: Command, out: &mut impl Write) -> Result<()> {
    let Some(dir) = &args.out else { return Ok(clap_mangen::Man::new(command).render(out)?) };
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    clap_mangen::generate_to(command, dir).with_context(|| dir.display().to_string())
}
