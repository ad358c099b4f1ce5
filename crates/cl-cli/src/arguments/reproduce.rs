//! Arguments of `cl reproduce`.

use std::path::PathBuf;

use clap::ValueEnum;

use super::study::StageArgs;

/// Largest seed: configurations are TOML, whose integers are signed, and a study multiplies its seeds.
const MAX_SEED: u64 = i64::MAX as u64 / 1_000_000;

/// Scale of the comparison.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StudyProfile {
    /// A small model and synthetic tasks; takes minutes.
    Tiny,
    /// SmolLM2-135M and samples of the paper's tasks; takes a night on one core.
    Smol,
    /// The paper's model and data; takes weeks on a large GPU.
    Paper,
}

/// Arguments of `cl reproduce`.
#[derive(clap::Args)]
pub struct Args {
    /// Output directory. Completed stages in it are reused, so the same command continues an interrupted study.
    #[arg(long, value_name = "DIR", default_value = "target/reproduce")]
    pub out: PathBuf,
    /// Scale of the comparison; `smol` and `paper` need --model and --data.
    #[arg(long, value_enum, default_value = "tiny")]
    pub profile: StudyProfile,
    /// Model directory, for the profiles `smol` and `paper`.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Data directory, for the profiles `smol` and `paper`: TRACE's tasks, directly or in `trace`; `gsm8k` or
    /// `metamath`; and lm-eval's tasks, directly or in `lm-eval`.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Maximum number of training rows and of test documents per task, for the profiles `smol` and `paper`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Random seed of facts, tasks and base model, for the profile `tiny`.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    pub seed: u64,
    /// For the profile `tiny`: one seed, fewer test rows, and no additional experiments.
    #[arg(long)]
    pub quick: bool,
    /// Stages to run, and how.
    #[command(flatten)]
    pub stages: StageArgs,
}
