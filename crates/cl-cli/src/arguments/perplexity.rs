//! Arguments of `cl eval perplexity`.

use std::path::PathBuf;

use cl_data::Format;
use cl_eval::DEFAULT_BATCH_TOKENS;
use cl_hub::HubArgs;

use super::compute::ComputeArgs;

/// Arguments of `cl eval perplexity`.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory, or a Hub name with --hub.
    pub model: PathBuf,
    /// Data files (JSON, JSONL, CSV, TSV, Parquet), or plain text (.txt), each of which is one document.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// PEFT adapter directory; can be repeated; each is evaluated separately.
    #[arg(long)]
    pub adapter: Vec<PathBuf>,
    /// Also evaluate the model without adapters.
    #[arg(long, requires = "adapter")]
    pub base: bool,
    /// Maximum number of examples of a file: the first ones.
    #[arg(long, value_parser = super::values::count)]
    pub limit: Option<usize>,
    /// Format of the rows: auto, prompt_answer, prompt_completion, alpaca, meta_math, gsm8k, messages, text.
    #[arg(long, default_value = "auto", value_parser = super::values::word::<Format>)]
    pub format: Format,
    /// Names of the fields, for example --columns answer=article for a text in the field `article`; keys: prompt,
    /// answer, messages.
    #[arg(long, value_name = "KEY=FIELD")]
    pub columns: Vec<String>,
    /// Maximum number of tokens per sequence [default: the model's context].
    #[arg(long, value_parser = super::values::count)]
    pub max_length: Option<usize>,
    /// Maximum number of tokens per forward pass.
    #[arg(long, value_parser = super::values::count, default_value_t = DEFAULT_BATCH_TOKENS)]
    pub batch_tokens: usize,
    /// Also write the results to this file, as JSON.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Dtype, quantization and device.
    #[command(flatten)]
    pub compute: ComputeArgs,
}
