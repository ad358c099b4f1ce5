//! Arguments of `cl reproduce`.

use std::path::PathBuf;

use clap::ValueEnum;

use super::study::StageArgs;

/// Configurations are TOML, whose integers are signed; a study multiplies its seeds.
const MAX_SEED: u64 = i64::MAX as u64 / 1_000_000;

/// What the paper's comparison is made with.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StudyProfile {
    /// A small model and tasks made from seeds; minutes on any machine.
    Tiny,
    /// SmolLM2-135M and samples of the paper's tasks; a night of one core.
    Smol,
    /// The paper's model and data; weeks of a large GPU.
    Paper,
}

/// Arguments of `cl reproduce`.
#[derive(clap::Args)]
pub struct Args {
    /// Directory for the study. The stages that are done there stay; the same command goes on after a stop.
    #[arg(long, value_name = "DIR", default_value = "target/reproduce")]
    pub out: PathBuf,
    /// What the comparison is made with; `smol` and `paper` need --model and --data.
    #[arg(long, value_enum, default_value = "tiny")]
    pub profile: StudyProfile,
    /// Model directory of the profiles `smol` and `paper`.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Data of the profiles `smol` and `paper`: tasks in TRACE's layout there or in its folder `trace`, `gsm8k` or `metamath`, and
    /// lm-eval's tasks there or in `lm-eval`.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Of the profiles `smol` and `paper`: at most so many training rows and test documents of each task.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Random seed of facts, tasks and the small base model of the profile `tiny`.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    pub seed: u64,
    /// Of the profile `tiny`: one seed and fewer test rows, and none of the questions that the paper leaves open.
    #[arg(long)]
    pub quick: bool,
    /// Which stages are run, and how.
    #[command(flatten)]
    pub stages: StageArgs,
}
