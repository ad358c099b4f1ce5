//! Arguments of `cl moe`.

use std::num::NonZero;
use std::path::PathBuf;

use cl_checkpoint::Precision;
use cl_hub::HubArgs;

use super::prompts::PromptArgs;

/// Subcommands of `cl moe`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Build a mixture of experts from a base and models fine-tuned from it (TOML or mergekit-moe YAML).
    Mix(cl_moe::cli::MixArgs),
    /// Build a mixture of LoRA adapters of one base, with a router per linear layer (TOML).
    Blend(cl_moe::cli::BlendArgs),
    /// Compute hidden states of the experts' prompts, to initialize routers.
    States(StatesArgs),
    /// Train the routers of a mixture, with base and experts frozen.
    TrainRouter(TrainRouterArgs),
    /// Find the adapters closest to a task by the hidden states of a few prompts, and combine them for it.
    Route(RouteArgs),
}

/// Options of the computation of hidden states.
#[derive(clap::Args)]
pub struct ComputeArgs {
    /// Dtype of the computation.
    #[arg(long, value_parser = super::values::precision(), default_value = "f32")]
    pub precision: Precision,
    /// Device: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
}

/// Arguments of `cl moe route`.
#[derive(clap::Args)]
pub struct RouteArgs {
    /// Configuration of a mixture of adapters, with `positive_prompts` for each expert.
    pub config: PathBuf,
    /// The task's prompts.
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Number of prompts to use; the first ones of --prompts.
    #[arg(long, value_name = "N", default_value = "16", value_parser = super::values::at_least_one)]
    pub limit: NonZero<usize>,
    /// Number of adapters to select; their weights sum to 1.
    #[arg(long, value_name = "K", default_value = "1", value_parser = super::values::at_least_one)]
    pub top: NonZero<usize>,
    /// Temperature: similarities are divided by it before the softmax over the selected adapters.
    #[arg(long, default_value_t = 0.1)]
    pub temperature: f64,
    /// Adapter directory to write: the sum of the selected adapters' updates, each multiplied by its weight.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// The computation.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Replace the output if all of its files were written by this program.
    #[arg(long)]
    pub overwrite: bool,
}

/// Arguments of `cl moe train-router`.
#[derive(clap::Args)]
pub struct TrainRouterArgs {
    /// Configuration: model, adapter for a mixture of adapters, [data], [train], [router].
    pub config: PathBuf,
    /// Directory for log.jsonl, rows.json, routing.json, routing.svg, routing.png, and mixture/ or model/.
    #[arg(long)]
    pub out: PathBuf,
    /// Override a key of the configuration, for example --set router.load_balancing=0.01.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Resume an unfinished run.
    #[arg(long)]
    pub resume: bool,
}

/// Arguments of `cl moe states`.
#[derive(clap::Args)]
pub struct StatesArgs {
    /// Configuration of the mixture, with `positive_prompts` for each expert.
    pub config: PathBuf,
    /// Output file, for `router.states` or `cl moe mix --states`.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// How to reduce a prompt to one vector per layer; overrides `router.pooling`, which defaults to last.
    #[arg(long, value_enum)]
    pub pooling: Option<PoolingArg>,
    /// The computation.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Replace the file if it exists.
    #[arg(long)]
    pub overwrite: bool,
}

/// Values of `--pooling`.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum PoolingArg {
    /// Hidden state of the last token.
    Last,
    /// Mean over all tokens.
    Mean,
    /// Direction of the sum of all token embeddings, for all layers.
    Embeddings,
}
