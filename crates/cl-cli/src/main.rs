//! `cl`: add knowledge to a language model round after round. Parses, calls the libraries, reports.

mod commands;
mod output;
mod progress;

use std::process::ExitCode;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use clap::{CommandFactory, Parser, Subcommand};

use crate::output::{Stdout, is_closed_pipe};
use crate::progress::AboveBars;

/// Add knowledge to a language model, round after round, and see what it keeps.
///
/// A model is a Hugging Face directory (config.json, model.safetensors, tokenizer.json).
/// Progress goes to stderr, results to files, a summary to stdout.
#[derive(Parser)]
#[command(
    name = "cl",
    version,
    after_help = "Start here:\n  cl generate MODEL --prompt \"The capital of France is\"\n  \
    cl check CONFIG        what a configuration would do, without doing it\n  \
    cl sequence CONFIG --out DIR\n  cl merge run CONFIG --out DIR\nConfigurations to start from: examples/configs/"
)]
struct Cli {
    /// Threads that training and scoring compute with, as in `cl --threads 2 train`; one for each core when absent.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Turn a GGUF file into a Hugging Face model directory.
    ImportGguf(commands::import_gguf::Args),
    /// Continue prompts, by greedy decoding or sampling.
    Generate(commands::generate::Args),
    /// Talk to a model.
    Chat(commands::chat::Args),
    /// Fine-tune a model once: to an adapter (LoRA) or with all weights.
    Train(commands::train::Args),
    /// Fine-tune on tasks one after another and score all of them after every round.
    Sequence(commands::sequence::Args),
    /// Score a model on tasks; compare two runs.
    Eval(commands::compare::EvalArgs),
    /// Compute scores again from predictions files alone.
    Score(cl_eval::cli::ScoreArgs),
    /// Put finished runs into one table: methods by tasks, with averages and gains over the base.
    Table(cl_eval::cli::TableArgs),
    /// Merge models; compare and verify them.
    #[command(subcommand)]
    Merge(cl_merge::cli::Command),
    /// Combine adapters, fold them into their base, extract, describe and compare them.
    #[command(subcommand)]
    Adapter(cl_merge::adapter::cli::AdapterCommand),
    /// Make mixtures of experts of models or adapters, and train their routers.
    #[command(subcommand)]
    Moe(commands::moe::Command),
    /// What a run did with its data.
    #[command(subcommand)]
    Data(commands::data::Command),
    /// Check a configuration without running it, or a model or adapter directory with every value in it.
    Check(commands::check::Args),
    /// Run the embedded study: a small model of our own, four tasks, the paper's first tables.
    Reproduce(commands::reproduce::Args),
    /// Recompute the paper's printed averages, gains and BWT from its tables' cells.
    PaperTables(commands::paper_tables::Args),
    /// Print completions for a shell.
    Completions(commands::shell::CompletionsArgs),
    /// Print the manual page, or write those of all commands.
    Man(commands::shell::ManArgs),
}

impl Command {
    /// Whether it trains or scores, so that libtorch's threads work all the time.
    fn computes(&self) -> bool {
        use Command::{Chat, Eval, Generate, Moe, Reproduce, Sequence, Train};
        match self {
            Moe(command) => command.computes(),
            _ => matches!(self, Generate(_) | Chat(_) | Train(_) | Sequence(_) | Eval(_) | Reproduce(_)),
        }
    }

    /// Whether it merges by decomposing matrices.
    fn decomposes(&self) -> bool {
        match self {
            Command::Merge(command) => command.decomposes(),
            Command::Adapter(_) => true,
            _ => false,
        }
    }
}

fn main() -> ExitCode {
    let Cli { command, threads, log } = Cli::parse();
    log.init(|| AboveBars);
    if command.computes() {
        cl_torch::wait_briefly();
    }
    if command.decomposes() {
        cl_merge::cli::give_memory_back();
    }
    // Before libtorch does anything: it asks for its CUDA half once, and keeps the answer.
    let cuda = cl_torch::load_cuda();
    if let Some(threads) = threads {
        cl_torch::set_threads(threads);
    }
    let interrupt = match Interrupt::on_signals() {
        Ok(interrupt) => interrupt,
        Err(error) => {
            tracing::error!("signal handlers cannot be set: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = cuda.map_err(anyhow::Error::from).and_then(|_| run(command, log, &interrupt));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has read enough, as `head` does.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", cl_checkpoint::files::with_causes(error.as_ref()));
            // What a shell expects of a program that Ctrl-C has stopped.
            interrupt.exit_code().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

fn run(command: Command, log: LogArgs, interrupt: &Interrupt) -> Result<()> {
    let mut out = Stdout::new();
    match command {
        Command::ImportGguf(args) => commands::import_gguf::run(&args, &mut out),
        Command::Generate(args) => commands::generate::run(&args, interrupt, &mut out),
        Command::Chat(args) => commands::chat::run(&args, interrupt, &mut out),
        Command::Train(args) => commands::train::run(&args, log, interrupt, &mut out),
        Command::Sequence(args) => commands::sequence::run(&args, log, interrupt, &mut out),
        Command::Eval(args) => commands::compare::run(&args, log, &mut out),
        Command::Score(args) => cl_eval::cli::run_score(&args, &mut out),
        Command::Table(args) => cl_eval::cli::run_table(&args, &mut out),
        Command::Merge(command) => cl_merge::cli::run(&command, interrupt, &mut out),
        Command::Adapter(command) => cl_merge::adapter::cli::run_adapter(&command, interrupt, &mut out),
        Command::Moe(command) => commands::moe::run(command, log, interrupt, &mut out),
        Command::Data(command) => commands::data::run(&command, &mut out),
        Command::Check(args) => commands::check::run(&args, &mut out),
        Command::Reproduce(args) => commands::reproduce::run(&args, log, interrupt, &mut out),
        Command::PaperTables(args) => commands::paper_tables::run(&args, &mut out),
        Command::Completions(args) => commands::shell::completions(&args, Cli::command(), &mut out),
        Command::Man(args) => commands::shell::man(&args, Cli::command(), &mut out),
    }
}
