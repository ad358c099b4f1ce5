//! Arguments of `cl study`.

use std::num::NonZero;
use std::path::PathBuf;

use cl_hub::HubArgs;

/// Arguments of `cl study`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration, TOML; see examples/configs/study.toml.
    pub config: PathBuf,
    /// Directory for the study. The stages that are done there stay; the same command goes on after a stop.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Override a key of the configuration, for example --set lora.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Whether names may lead to the hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Which stages are run, and how.
    #[command(flatten)]
    pub stages: StageArgs,
}

/// Which stages are run, and how.
#[derive(clap::Args)]
pub struct StageArgs {
    /// Stages that run at once, each with the memory of a training; one when absent, `cl reproduce` one for each core.
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZero<usize>>,
    /// Only the stages whose name starts with this, and what they need; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// List the stages with their steps, tokens, about their time, space and memory; write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Keep the models of finished stages; otherwise adapters and scores are kept.
    #[arg(long)]
    pub keep_models: bool,
}
