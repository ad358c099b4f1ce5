//! The command line of `cl`: all commands and their arguments. Those of light commands are defined with the commands.

pub mod chat;
pub mod check;
pub mod compute;
pub mod decoding;
pub mod eval;
pub mod generate;
pub mod moe;
pub mod perplexity;
pub mod plan;
pub mod prompts;
pub mod ranks;
pub mod reproduce;
pub mod sequence;
pub mod study;
pub mod train;
pub(crate) mod values;

use cl_checkpoint::logging::LogArgs;

use crate::light::{data, import_gguf, paper_tables, publish, report, shell};

/// Add knowledge to a language model in successive rounds, and measure what it retains.
///
/// A model is a Hugging Face directory (config.json, model.safetensors, tokenizer.json).
/// Progress goes to stderr, results to files, a summary to stdout.
#[derive(clap::Parser)]
#[command(
    name = "cl",
    bin_name = "cl",
    version,
    after_help = "Examples:\n  cl generate MODEL --prompt \"The capital of France is\"\n  \
    cl check CONFIG        check a configuration without running it\n  \
    cl sequence CONFIG --out DIR\n  cl merge run CONFIG --out DIR\nExample configurations: examples/configs/"
)]
pub struct Cli {
    /// Number of threads for training, evaluation and merges, as in `cl --threads 2 train` [default: number of cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Options for messages on stderr.
    #[command(flatten)]
    pub log: LogArgs,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `cl`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Convert a GGUF file to a Hugging Face model directory.
    ImportGguf(import_gguf::Args),
    /// Generate text from prompts, by greedy decoding or sampling.
    Generate(generate::Args),
    /// Chat with a model.
    Chat(chat::Args),
    /// Fine-tune a model, with LoRA or all weights.
    Train(train::Args),
    /// Fine-tune a model on several tasks in sequence, and evaluate it on all of them after each round.
    Sequence(sequence::Args),
    /// Evaluate a model on tasks or by its perplexity on texts, or compare two evaluations.
    Eval(eval::EvalArgs),
    /// Recompute scores from predictions files, without a model.
    Score(cl_eval::cli::ScoreArgs),
    /// Print one table of several runs: methods by tasks, with averages and gains over the base.
    Table(cl_eval::cli::TableArgs),
    /// Write a report of a study or of finished runs: an HTML page, tables and figures.
    Report(report::Args),
    /// Merge, compare and verify models.
    #[command(subcommand)]
    Merge(cl_merge::cli::Command),
    /// Combine, fold, extract, describe and compare LoRA adapters.
    #[command(subcommand)]
    Adapter(cl_merge::adapter::cli::AdapterCommand),
    /// Create mixtures of experts from models or adapters, and train their routers.
    #[command(subcommand)]
    Moe(moe::Command),
    /// Inspect training data.
    #[command(subcommand)]
    Data(data::Command),
    /// Check a configuration without running it, or all values of a model or adapter directory.
    Check(check::Args),
    /// Estimate the memory of training on several GPUs, and find the zero_stage that fits.
    Plan(plan::Args),
    /// Compare methods on the same tasks: sequences, replay, joint training, merges, mixtures, with several seeds.
    Study(study::Args),
    /// Reproduce the paper's tables and figures, with a small model and synthetic tasks.
    Reproduce(reproduce::Args),
    /// Write a model card for a model or adapter, and upload it to the Hugging Face Hub.
    Publish(publish::Args),
    /// Recompute the averages, gains and BWT of the paper's tables from their cells.
    PaperTables(paper_tables::Args),
    /// Print shell completions.
    Completions(shell::CompletionsArgs),
    /// Print the man page, or write the man pages of all commands.
    Man(shell::ManArgs),
}

impl Command {
    /// Whether the command stops by itself when that is requested, for example to save a checkpoint. Signals end all
    /// others.
    pub fn stops_on_request(&self) -> bool {
        match self {
            Command::Merge(command) => command.stops_on_request(),
            Command::Adapter(command) => command.stops_on_request(),
            Command::Eval(args) => !matches!(args.command, Some(eval::EvalCommand::Compare(_))),
            Command::ImportGguf(_)
            | Command::Score(_)
            | Command::Table(_)
            | Command::Report(_)
            | Command::Data(_)
            | Command::Check(_)
            | Command::Plan(_)
            | Command::PaperTables(_)
            | Command::Completions(_)
            | Command::Man(_) => false,
            Command::Generate(_)
            | Command::Chat(_)
            | Command::Train(_)
            | Command::Sequence(_)
            | Command::Moe(_)
            | Command::Study(_)
            | Command::Reproduce(_)
            | Command::Publish(_) => true,
        }
    }

    /// Sets the number of threads of merges, unless it was given after the command.
    pub fn default_threads(&mut self, threads: u16) {
        match self {
            Command::Merge(command) => command.default_threads(threads.into()),
            Command::Adapter(command) => command.default_threads(threads.into()),
            Command::Moe(moe::Command::Mix(args)) => args.default_threads(threads.into()),
            _ => {}
        }
    }

    /// Whether the command decomposes matrices.
    pub fn decomposes(&self) -> bool {
        match self {
            Command::Merge(command) => command.decomposes(),
            Command::Adapter(_) => true,
            _ => false,
        }
    }
}
