//! Arguments of `cl sequence`.

use std::path::PathBuf;

use cl_hub::HubArgs;

use super::ranks::RankArgs;

/// Arguments of `cl sequence`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration (TOML): model, data, tasks or [[rounds]], [train.lora] or [train.full], [mixture], [replay],
    /// [eval].
    pub config: PathBuf,
    /// Output directory, for rounds/, matrix.json and tables.md.
    #[arg(long)]
    pub out: PathBuf,
    /// Override a key of the configuration, for example --set replay.fraction=0.1.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Resume an unfinished sequence.
    #[arg(long)]
    pub resume: bool,
    /// Several processes.
    #[command(flatten)]
    pub ranks: RankArgs,
}
