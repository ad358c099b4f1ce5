//! Arguments of `cl moe`.

use std::path::PathBuf;

use cl_checkpoint::Precision;
use cl_hub::HubArgs;

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
    /// Output file, for `router.states`.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// How to reduce a prompt to one vector per layer.
    #[arg(long, value_enum, default_value = "last")]
    pub pooling: PoolingArg,
    /// Dtype of the computation.
    #[arg(long, value_parser = super::values::precision(), default_value = "f32")]
    pub precision: Precision,
    /// Device: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
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
    /// Mean of the token embeddings, for all layers.
    Embeddings,
}
