//! Prompts of `cl generate` and `cl moe route`.

use std::path::PathBuf;

/// Prompt arguments of `cl generate` and `cl moe route`.
#[derive(clap::Args)]
pub struct PromptArgs {
    /// Prompt; can be repeated.
    #[arg(long, required_unless_present = "prompts", conflicts_with = "prompts", allow_hyphen_values = true)]
    pub prompt: Vec<String>,
    /// File of prompts (JSONL, JSON or Parquet) with rows {"prompt": TEXT} or {"messages": [{"role", "content"}, ...]}.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Apply the chat template, with each prompt as a user message.
    #[arg(long)]
    pub chat: bool,
    /// System message of conversations without one.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Chat template (Jinja) instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
}
