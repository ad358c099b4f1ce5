//! The command line of `cl`, and the commands that need no libtorch.
//!
//! Loading libtorch takes a quarter of a second, so `cl` consists of two programs: `cl` itself, which does not link
//! libtorch and runs the commands that need no model, and `cl-engine`, by which `cl` replaces itself for all others.

// Help texts contain TOML tables in brackets and names of values in angle brackets.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::invalid_html_tags, rustdoc::bare_urls)]

pub mod arguments;
pub mod light;
pub mod output;

use std::process::ExitCode;

use anyhow::Result;
use cl_checkpoint::logging::LogArgs;
use cl_checkpoint::{Interrupt, raise_file_limit};
use clap::Parser;

use crate::arguments::Cli;
use crate::light::ModelCommand;
use crate::output::{Stdout, is_closed_pipe};

/// The context in which a command that needs a model is run.
pub struct Context<'a> {
    /// `--threads`.
    pub threads: Option<u16>,
    /// Options for messages on stderr.
    pub log: LogArgs,
    /// Used to request a stop.
    pub interrupt: &'a Interrupt,
    /// Standard output.
    pub out: &'a mut Stdout,
}

/// Parses the arguments of the process and runs the command; commands that need a model are passed to `with_model`.
/// `subscribe` sets up logging.
pub fn run(
    subscribe: impl FnOnce(LogArgs),
    with_model: impl FnOnce(ModelCommand, Context<'_>) -> Result<()>,
) -> ExitCode {
    let Cli { mut command, threads, log } = Cli::parse();
    subscribe(log);
    raise_file_limit();
    if let Some(threads) = threads {
        command.default_threads(threads);
    }
    if command.decomposes() {
        cl_merge::cli::give_memory_back();
    }
    let interrupt = if command.stops_on_request() { Interrupt::on_signals() } else { Ok(Interrupt::default()) };
    let interrupt = match interrupt {
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
        // The reader has closed the pipe, as `head` does; this is not an error.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", cl_checkpoint::files::with_causes(error.as_ref()));
            // After Ctrl-C, exit with the code that shells expect.
            interrupt.exit_code().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}
