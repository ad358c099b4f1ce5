//! The commands that need no libtorch.

pub mod data;
pub mod import_gguf;
pub mod paper_tables;
pub mod publish;
pub mod report;
pub mod shell;

use std::io::Write;

use anyhow::{Context, Result};
use cl_checkpoint::Interrupt;
use clap::CommandFactory;

use crate::arguments::eval::{EvalArgs, EvalCommand};
use crate::arguments::{
    Cli, Command, chat, check, eval, generate, moe, perplexity, plan, reproduce, sequence, study, train,
};

/// A command that needs libtorch.
pub enum ModelCommand {
    /// `cl generate`.
    Generate(generate::Args),
    /// `cl chat`.
    Chat(chat::Args),
    /// `cl train`.
    Train(train::Args),
    /// `cl sequence`.
    Sequence(sequence::Args),
    /// `cl eval`.
    Eval(eval::Args),
    /// `cl eval perplexity`.
    Perplexity(perplexity::Args),
    /// `cl moe states`.
    RouterStates(moe::StatesArgs),
    /// `cl moe route`.
    Route(moe::RouteArgs),
    /// `cl moe train-router`.
    TrainRouter(moe::TrainRouterArgs),
    /// `cl check`, which needs the code that runs models, to check architectures and adapters.
    Check(check::Args),
    /// `cl plan`.
    Plan(plan::Args),
    /// `cl study`.
    Study(study::Args),
    /// `cl reproduce`.
    Reproduce(reproduce::Args),
}

/// Runs a command that does not need libtorch; returns all other commands.
pub fn run(command: Command, interrupt: &Interrupt, out: &mut impl Write) -> Result<Option<ModelCommand>> {
    match command {
        Command::ImportGguf(args) => import_gguf::run(&args, out)?,
        Command::Score(args) => cl_eval::cli::run_score(&args, out)?,
        Command::Table(args) => cl_eval::cli::run_table(&args, out)?,
        Command::Report(args) => report::run(&args, out)?,
        Command::Merge(command) => cl_merge::cli::run(&command, interrupt, out)?,
        Command::Adapter(command) => cl_merge::adapter::cli::run_adapter(&command, interrupt, out)?,
        Command::Data(command) => data::run(&command, out)?,
        Command::Publish(args) => publish::run(&args, interrupt, out)?,
        Command::PaperTables(args) => paper_tables::run(&args, out)?,
        Command::Completions(args) => shell::completions(&args, Cli::command(), out)?,
        Command::Man(args) => shell::man(&args, Cli::command(), out)?,
        Command::Moe(moe::Command::Mix(args)) => cl_moe::cli::run(&cl_moe::cli::Command::Mix(args), interrupt, out)?,
        Command::Moe(moe::Command::Blend(args)) => {
            cl_moe::cli::run(&cl_moe::cli::Command::Blend(args), interrupt, out)?;
        }
        Command::Moe(moe::Command::States(args)) => return Ok(Some(ModelCommand::RouterStates(args))),
        Command::Moe(moe::Command::Route(args)) => return Ok(Some(ModelCommand::Route(args))),
        Command::Moe(moe::Command::TrainRouter(args)) => return Ok(Some(ModelCommand::TrainRouter(args))),
        Command::Eval(EvalArgs { command, eval }) => match command {
            Some(EvalCommand::Perplexity(args)) => return Ok(Some(ModelCommand::Perplexity(*args))),
            Some(EvalCommand::Compare(args)) => cl_eval::cli::run_compare(&args, out)?,
            // Without a subcommand, the parser requires a model.
            None => return eval.map(ModelCommand::Eval).context("cl eval: no model given").map(Some),
        },
        Command::Generate(args) => return Ok(Some(ModelCommand::Generate(args))),
        Command::Chat(args) => return Ok(Some(ModelCommand::Chat(args))),
        Command::Train(args) => return Ok(Some(ModelCommand::Train(args))),
        Command::Sequence(args) => return Ok(Some(ModelCommand::Sequence(args))),
        Command::Check(args) => return Ok(Some(ModelCommand::Check(args))),
        Command::Plan(args) => return Ok(Some(ModelCommand::Plan(args))),
        Command::Study(args) => return Ok(Some(ModelCommand::Study(args))),
        Command::Reproduce(args) => return Ok(Some(ModelCommand::Reproduce(args))),
    }
    Ok(None)
}
