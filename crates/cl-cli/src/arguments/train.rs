//! Arguments of `cl train`.

use std::path::PathBuf;

use cl_hub::HubArgs;

use super::ranks::RankArgs;

/// Arguments of `cl train`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration (TOML): model, [data], [train.lora] or [train.full]. `cl check` checks it without running it.
    pub config: PathBuf,
    /// Output directory, for log.jsonl, rows.json, adapter/ and model/, and with keep_checkpoints for checkpoints/.
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
    /// Finish an unfinished run now, with the weights of its last checkpoint. To be able to continue it as well, copy
    /// the output directory first.
    #[arg(long, conflicts_with = "resume")]
    pub finish: bool,
    /// Several processes.
    #[command(flatten)]
    pub ranks: RankArgs,
}
