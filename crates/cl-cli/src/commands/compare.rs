use std::io::Write;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_eval::cli::{CompareArgs, run_compare};

use super::eval;

/// Arguments of `cl eval`: a model and tasks, or a subcommand.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: Option<EvalCommand>,
    #[command(flatten)]
    eval: Option<eval::Args>,
}

#[derive(clap::Subcommand)]
enum EvalCommand {
    /// Compare two runs document by document: differences with confidence intervals, and McNemar's test.
    Compare(CompareArgs),
}

/// Runs the command.
pub fn run(args: EvalArgs, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    match (args.command, args.eval) {
        (Some(EvalCommand::Compare(args)), _) => run_compare(&args, out),
        (None, Some(args)) => eval::run(args, log, interrupt, out),
        (None, None) => Ok(()), // not reached: without a command the parser insists on a model
    }
}
