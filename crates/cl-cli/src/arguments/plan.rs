//! Arguments of `cl plan`.

use std::path::PathBuf;

/// Arguments of `cl plan`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration of `cl train`. Of the model, only config.json is read.
    pub config: PathBuf,
    /// Number of GPUs, GPU model and memory of each: 8xA100-80GB, or 4x24GB without a model name.
    #[arg(long, value_name = "NxKIND-MEMORY")]
    pub gpus: String,
    /// Override a key of the configuration, for example --set train.micro_batch_size=1.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}
