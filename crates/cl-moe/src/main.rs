//! `cl-moe`: mixtures of experts from fine-tuned models.

use std::process::ExitCode;

use cl_checkpoint::logging::LogArgs;
use cl_checkpoint::{Interrupt, raise_file_limit};
use cl_moe::cli::Command;
use clap::Parser;

/// Mixtures of experts from fine-tuned models, in bounded memory.
///
/// A model is a Hugging Face directory (config.json, model.safetensors or shards, tokenizer files).
#[derive(Parser)]
#[command(name = "cl-moe", version)]
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
    let interrupt = match Interrupt::on_signals() {
        Ok(interrupt) => interrupt,
        Err(error) => {
            tracing::error!("signal handlers cannot be set: {error}");
            return ExitCode::FAILURE;
        }
    };
    match cl_moe::cli::run(&command, &interrupt, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            interrupt.exit_code().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}
