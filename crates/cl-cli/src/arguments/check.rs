//! Arguments of `cl check`.

use std::path::PathBuf;

use cl_hub::HubArgs;

/// Arguments of `cl check`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration of `cl train`, `cl sequence` or `cl moe train-router`, or the directory of a model, an adapter or a mixture.
    pub path: PathBuf,
    /// Override a key of the configuration, for example --set train.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
}
