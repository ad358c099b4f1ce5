//! The command line of `cl`, and the commands that need no libtorch.
//!
//! Loading libtorch takes a quarter of a second, so `cl` is two programs: `cl` itself, which links none of it and does what
//! needs no model, and `cl-engine` beside it, which `cl` becomes for everything else.

// Help texts name TOML tables in brackets and places of values in angle brackets.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::invalid_html_tags, rustdoc::bare_urls)]

pub mod arguments;
pub mod light;
pub mod output;

use std::process::ExitCode;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use clap::Parser;

use crate::arguments::Cli;
use crate::light::ModelCommand;
use crate::output::{Stdout, is_closed_pipe};

/// What a command that needs a model is run with.
pub struct Context<'a> {
    /// `--threads`.
    pub threads: Option<u16>,
    /// What is written to stderr.
    pub log: LogArgs,
    /// The request to stop.
    pub interrupt: &'a Interrupt,
    /// Standard output.
    pub out: &'a mut Stdout,
}

/// Parses the process's arguments and runs the command; one that needs a model is handed to `with_model`. `subscribe` sets up
/// where messages go.
pub fn run(
    subscribe: impl FnOnce(LogArgs),
    with_model: impl FnOnce(ModelCommand, Context<'_>) -> Result<()>,
) -> ExitCode {
    let Cli { command, threads, log } = Cli::parse();
    subscribe(log);
    if command.decomposes() {
        cl_merge::cli::give_memory_back();
    }
    let interrupt = match Interrupt::on_signals() {
        Ok(interrupt) => interrupt,
        Err(error) => {
            tracing::error!("cannot set signal handlers: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut out = Stdout::lock();
    let result = light::run(command, &interrupt, &mut out).and_then(|rest| match rest {
        Some(command) => with_model(command, Context { threads, log, interrupt: &interrupt, out: &mut out }),
        None => Ok(()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has closed the pipe, as `head` does.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", cl_checkpoint::files::with_causes(error.as_ref()));
            // The exit code that shells expect after Ctrl-C.
            interrupt.exit_code().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}
