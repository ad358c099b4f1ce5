//! `cl`: continual fine-tuning, evaluation and merging of language models. Parses arguments, calls the libraries,
//! prints results.

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

/// Add knowledge to a language model round after round, and measure what it retains.
///
/// A model is a Hugging Face directory (config.json, model.safetensors, tokenizer.json).
/// Progress goes to stderr, results to files, a summary to stdout.
#[derive(Parser)]
#[command(
    name = "cl",
    version,
    after_help = "Examples:\n  cl generate MODEL --prompt \"The capital of France is\"\n  \
    cl check CONFIG        check a configuration without running it\n  \
    cl sequence CONFIG --out DIR\n  cl merge run CONFIG --out DIR\nExample configurations: examples/configs/"
)]
struct Cli {
    /// Number of threads for training and evaluation, as in `cl --threads 2 train` [default: number of cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Convert a GGUF file to a Hugging Face model directory.
    ImportGguf(commands::import_gguf::Args),
    /// Generate text from prompts, by greedy decoding or sampling.
    Generate(commands::generate::Args),
    /// Chat with a model.
    Chat(commands::chat::Args),
    /// Fine-tune a model: LoRA, or all weights.
    Train(commands::train::Args),
    /// Fine-tune a model on several tasks in sequence, and evaluate it on all of them after each round.
    Sequence(commands::sequence::Args),
    /// Evaluate a model on tasks, or compare two evaluations.
    Eval(commands::compare::EvalArgs),
    /// Recompute scores from predictions files, without a model.
    Score(cl_eval::cli::ScoreArgs),
    /// Print one table of several runs: methods by tasks, with averages and gains over the base.
    Table(cl_eval::cli::TableArgs),
    /// Turn finished runs, or a study, into a report: a page, tables and figures.
    Report(commands::report::Args),
    /// Merge, compare and verify models.
    #[command(subcommand)]
    Merge(cl_merge::cli::Command),
    /// Combine, merge, extract, describe and compare LoRA adapters.
    #[command(subcommand)]
    Adapter(cl_merge::adapter::cli::AdapterCommand),
    /// Create mixtures of experts from models or adapters, and train their routers.
    #[command(subcommand)]
    Moe(commands::moe::Command),
    /// Inspect training data.
    #[command(subcommand)]
    Data(commands::data::Command),
    /// Check a configuration without running it, or all values of a model or adapter directory.
    Check(commands::check::Args),
    /// Compare ways of learning the same rounds: sequences, replay, joint training, merges, mixtures, with several seeds.
    Study(commands::study::Args),
    /// Reproduce the paper's tables and figures, with a small model and tasks made from seeds.
    Reproduce(commands::reproduce::Args),
    /// Make a model or adapter ready for the Hugging Face hub, with a model card, and upload it.
    Publish(commands::publish::Args),
    /// Recompute the averages, gains and BWT of the paper's tables from their cells.
    PaperTables(commands::paper_tables::Args),
    /// Print shell completions.
    Completions(commands::shell::CompletionsArgs),
    /// Print the man page, or write the man pages of all commands.
    Man(commands::shell::ManArgs),
}

impl Command {
    /// Whether it runs a model, so that libtorch's threads are busy.
    fn computes(&self) -> bool {
        use Command::{Chat, Eval, Generate, Moe, Reproduce, Sequence, Study, Train};
        match self {
            Moe(command) => command.computes(),
            _ => matches!(self, Generate(_) | Chat(_) | Train(_) | Sequence(_) | Eval(_) | Study(_) | Reproduce(_)),
        }
    }

    /// Whether it decomposes matrices.
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
    if command.decomposes() {
        cl_merge::cli::give_memory_back();
    }
    // Before any other use of libtorch, which looks for CUDA only once.
    let cuda = cl_torch::load_cuda();
    if let Some(threads) = threads {
        cl_torch::set_threads(threads);
    }
    if command.computes() {
        cl_torch::watch_load();
    }
    let interrupt = match Interrupt::on_signals() {
        Ok(interrupt) => interrupt,
        Err(error) => {
            tracing::error!("cannot set signal handlers: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = cuda.map_err(anyhow::Error::from).and_then(|_| run(command, log, &interrupt));
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

fn run(command: Command, log: LogArgs, interrupt: &Interrupt) -> Result<()> {
    let mut out = Stdout::new();
    match command {
        Command::ImportGguf(args) => commands::import_gguf::run(&args, &mut out),
        Command::Generate(args) => commands::generate::run(args, interrupt, &mut out),
        Command::Chat(args) => commands::chat::run(args, interrupt, &mut out),
        Command::Train(args) => commands::train::run(&args, log, interrupt, &mut out),
        Command::Sequence(args) => commands::sequence::run(&args, log, interrupt, &mut out),
        Command::Eval(args) => commands::compare::run(args, log, interrupt, &mut out),
        Command::Score(args) => cl_eval::cli::run_score(&args, &mut out),
        Command::Table(args) => cl_eval::cli::run_table(&args, &mut out),
        Command::Report(args) => commands::report::run(&args, &mut out),
        Command::Merge(command) => cl_merge::cli::run(&command, interrupt, &mut out),
        Command::Adapter(command) => cl_merge::adapter::cli::run_adapter(&command, interrupt, &mut out),
        Command::Moe(command) => commands::moe::run(command, log, interrupt, &mut out),
        Command::Data(command) => commands::data::run(&command, &mut out),
        Command::Check(args) => commands::check::run(&args, interrupt, &mut out),
        Command::Study(args) => commands::study::run(&args, log, interrupt, &mut out),
        Command::Reproduce(args) => commands::reproduce::run(&args, log, interrupt, &mut out),
        Command::Publish(args) => commands::publish::run(&args, interrupt, &mut out),
        Command::PaperTables(args) => commands::paper_tables::run(&args, &mut out),
        Command::Completions(args) => commands::shell::completions(&args, Cli::command(), &mut out),
        Command::Man(args) => commands::shell::man(&args, Cli::command(), &mut out),
    }
}
