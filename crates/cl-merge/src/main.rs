//! `cl-merge`: merge models, compare and verify them.

use std::process::ExitCode;

use cl_checkpoint::logging::LogArgs;
use cl_checkpoint::{Interrupt, raise_file_limit};
use cl_merge::cli::Command;
use clap::Parser;

/// Merge language models by methods that need no data, on all cores and in bounded memory.
///
/// A model is a Hugging Face directory (config.json, model.safetensors or shards, tokenizer files).
#[derive(Parser)]
#[command(name = "cl-merge", version)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let Cli { command, log } = Cli::parse();
    log.init(std::io::stderr);
    raise_file_limit();
    if command.decomposes() {
        cl_merge::cli::give_memory_back();
    }
    let interrupt = if command.stops_on_request() { Interrupt::on_signals() } else { Ok(Interrupt::default()) };
    let interrupt = match interrupt {
        Ok(interrupt) => interrupt,
        Err(error) => {
            tracing::error!("signal handlers cannot be set: {error}");
            return ExitCode::FAILURE;
        }
    };
    match cl_merge::cli::run(&command, &interrupt, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has closed the pipe, for example `head`.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", cl_checkpoint::files::with_causes(error.as_ref()));
            interrupt.exit_code().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(broken))
}
