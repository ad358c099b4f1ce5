//! Arguments of `cl generate`.

use std::path::PathBuf;

use cl_eval::DEFAULT_BATCH_SEQUENCES;
use cl_hub::HubArgs;

use super::compute::ComputeArgs;
use super::decoding::DecodingArgs;
use super::prompts::PromptArgs;

/// Arguments of `cl generate`.
#[derive(clap::Args)]
#[command(
    after_help = "The text for a single --prompt is streamed; the texts for several are printed in the order of the \
    prompts. With --prompts, one JSON line per prompt is printed: \
    {\"prompt\", \"text\", \"tokens\", \"finish_reason\"}."
)]
pub struct Args {
    /// Model directory, or a Hub name with --hub.
    pub model: PathBuf,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// The prompts.
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Output file for --prompts, written when all texts are complete.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub out: Option<PathBuf>,
    /// PEFT adapter directory; can be repeated; the updates are added.
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Maximum number of new tokens.
    #[arg(long, default_value_t = 64)]
    pub max_new_tokens: usize,
    /// Decoding.
    #[command(flatten)]
    pub decoding: DecodingArgs,
    /// Maximum number of texts generated at the same time.
    #[arg(long, value_name = "N", value_parser = super::values::count, default_value_t = DEFAULT_BATCH_SEQUENCES)]
    pub batch_sequences: usize,
    /// Dtype, quantization and device.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Print token ids instead of text.
    #[arg(long, conflicts_with = "prompts")]
    pub ids: bool,
}
