//! Arguments of `cl moe`.

use std::path::PathBuf;

use cl_checkpoint::Precision;
use cl_hub::HubArgs;

/// Subcommands of `cl moe`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a mixture of experts of a base and models tuned from it: TOML, or mergekit-moe's YAML.
    Mix(cl_moe::cli::MixArgs),
    /// Make a mixture of experts of LoRA adapters of one base, with a router per linear layer: TOML.
    Blend(cl_moe::cli::BlendArgs),
    /// Compute hidden states of the experts' prompts, to initialize routers.
    States(StatesArgs),
    /// Train the routers of a mixture; base and experts stay as they are.
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
    /// Whether names may lead to the hub.
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
    /// Which hidden states of a prompt are used.
    #[arg(long, value_enum, default_value = "last")]
    pub pooling: PoolingArg,
    /// Dtype of the computation.
    #[arg(long, value_parser = super::precision(), default_value = "f32")]
    pub precision: Precision,
    /// Device: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Whether names may lead to the hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Replace the file if it exists.
    #[arg(long)]
    pub overwrite: bool,
}

/// Values of `--pooling`.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum PoolingArg {
    /// Those of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
    /// The mean of the token embeddings, for all layers.
    Embeddings,
}
