//! Arguments of `cl study`.

use std::num::NonZero;
use std::path::PathBuf;

use cl_hub::HubArgs;

/// Arguments of `cl study`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration (TOML); see examples/configs/study.toml.
    pub config: PathBuf,
    /// Output directory. Completed stages in it are reused, so the same command continues an interrupted study.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Override a key of the configuration, for example --set lora.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Stages to run, and how.
    #[command(flatten)]
    pub stages: StageArgs,
}

/// Stages to run, and how.
#[derive(clap::Args)]
pub struct StageArgs {
    /// Number of stages that run in parallel, each needing the memory of a training run [default: 1; in `cl reproduce`,
    /// one per core].
    #[arg(long, value_name = "N", value_parser = super::values::at_least_one)]
    pub jobs: Option<NonZero<usize>>,
    /// Run only stages whose name starts with NAME, and the stages they need; can be repeated.
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// List the stages with their steps and tokens, and estimates of time, disk space and memory; write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// With --dry-run: estimate for several GPUs that train together, given as for `cl plan`: 8xA100-80GB, or 4x24GB.
    #[arg(long, value_name = "NxKIND-MEMORY", requires = "dry_run")]
    pub gpus: Option<String>,
    /// Keep the models of finished stages; otherwise only adapters and scores are kept.
    #[arg(long)]
    pub keep_models: bool,
}
