//! `cl-merge`: merge models, compare and verify them.

use std::process::ExitCode;

use cl_merge::cli::Command;
use clap::Parser;

/// Merge language models: every published method that needs no data, on all cores, in bounded memory.
///
/// A model is a Hugging Face directory (config.json, model.safetensors or shards, tokenizer files).
#[derive(Parser)]
#[command(name = "cl-merge", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    match cl_merge::cli::run(&command, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
