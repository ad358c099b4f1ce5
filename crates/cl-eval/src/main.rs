//! `cl-eval`: recomputes scores from predictions files, and compares runs.

use std::process::ExitCode;

use cl_checkpoint::logging::LogArgs;
use cl_eval::cli::Command;
use clap::Parser;

/// Recompute scores from predictions files, and compare two runs, without a model.
#[derive(Parser)]
#[command(name = "cl-eval", version)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let Cli { command, log } = Cli::parse();
    log.init(std::io::stderr);
    match cl_eval::cli::run(&command, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has closed the pipe, as `head` does; this is not an error.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}"); // messages include the texts of their causes
            ExitCode::FAILURE
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(broken))
}
