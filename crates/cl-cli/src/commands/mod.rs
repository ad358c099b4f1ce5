//! The commands that run a model, one per file.

pub mod chat;
mod chat_template;
pub mod check;
pub mod decoding;
pub mod eval;
pub mod generate;
mod input;
mod loaded;
pub mod moe;
mod prompts;
mod reply;
pub mod reproduce;
pub mod sequence;
pub mod study;
pub mod train;

use std::path::Path;

use anyhow::Result;

/// Reads a configuration file.
pub fn read(path: &Path) -> Result<String> {
    Ok(cl_checkpoint::files::read_text(path, cl_checkpoint::files::MAX_CONFIG)?)
}
