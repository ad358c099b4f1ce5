//! Arguments of `cl reproduce`.

use std::path::PathBuf;

use super::study::StageArgs;

/// Configurations are TOML, whose integers are signed; a study multiplies its seeds.
const MAX_SEED: u64 = i64::MAX as u64 / 1_000_000;

/// Arguments of `cl reproduce`.
#[derive(clap::Args)]
pub struct Args {
    /// Directory for the study. The stages that are done there stay; the same command goes on after a stop.
    #[arg(long, value_name = "DIR", default_value = "target/reproduce")]
    pub out: PathBuf,
    /// Random seed of facts, tasks and the small base model.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    pub seed: u64,
    /// One seed and fewer test rows, and none of the questions that the paper leaves open.
    #[arg(long)]
    pub quick: bool,
    /// Which stages are run, and how.
    #[command(flatten)]
    pub stages: StageArgs,
}
