//! Arguments of `cl chat`.

use std::path::PathBuf;

use cl_hub::HubArgs;

use super::compute::ComputeArgs;
use super::decoding::DecodingArgs;

/// Arguments of `cl chat`.
#[derive(clap::Args)]
#[command(
    after_help = "Each line is a message. Commands: /reset starts a new conversation, /system TEXT changes the system \
    message, /exit or Ctrl-D ends the chat.\nCtrl-C ends a reply; a second Ctrl-C ends the program."
)]
pub struct Args {
    /// Model directory, or a Hub name with --hub.
    pub model: PathBuf,
    /// Downloads from the Hugging Face Hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// PEFT adapter directory; can be repeated; the updates are added.
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// System message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Chat template (Jinja) instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Maximum number of new tokens of a reply.
    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Decoding.
    #[command(flatten)]
    pub decoding: DecodingArgs,
    /// Dtype, quantization and device.
    #[command(flatten)]
    pub compute: ComputeArgs,
}
