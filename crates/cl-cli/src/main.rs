//! `cl`: continual fine-tuning, evaluation and merging of language models. Runs commands that need no model itself, and
//! executes `cl-engine` for all others.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

fn main() -> ExitCode {
    cl_cli::run(|log| log.init(std::io::stderr), |_, _| become_engine())
}

/// Replaces this process with the engine, passing the same arguments.
fn become_engine() -> Result<()> {
    let engine = engine()?;
    let error = Command::new(&engine).arg0("cl").args(std::env::args_os().skip(1)).exec();
    Err(error).with_context(|| engine.display().to_string())
}

/// Returns the path of `cl-engine`, which is in the same directory as this program.
fn engine() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the directory of `cl`")?;
    let engine = own.with_file_name("cl-engine");
    ensure!(
        engine.is_file(),
        "{}: no such file; this command runs a model, which needs the program `cl-engine` in the same directory: install both \
         (`cargo install` and `cargo build -p cl-cli` make both)",
        engine.display()
    );
    Ok(engine)
}
