//! Arguments of `cl train`.

use std::path::PathBuf;

use cl_hub::HubArgs;

/// Arguments of `cl train`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration (TOML): model, [data], [train.lora] or [train.full]. `cl check` checks it without running it.
    pub config: PathBuf,
    /// Output directory, for log.jsonl, rows.json, adapter/ and model/.
    #[arg(long)]
    pub out: PathBuf,
    /// Override a key of the configuration, for example --set train.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Resume an unfinished run.
    #[arg(long)]
    pub resume: bool,
    /// Seconds to wait for another rank, where torchrun or another launcher started several.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rank_timeout: u64,
}
