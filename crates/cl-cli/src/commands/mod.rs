//! One command, one file: its arguments and what it does with them.

pub mod chat;
mod chat_template;
pub mod check;
pub mod compare;
pub mod data;
mod decoding;
pub mod eval;
pub mod generate;
pub mod import_gguf;
mod input;
mod loaded;
pub mod moe;
pub mod paper_tables;
mod prompts;
mod reply;
pub mod report;
pub mod reproduce;
pub mod sequence;
pub mod shell;
pub mod study;
pub mod train;

use std::path::Path;

use anyhow::Result;

/// Reads a configuration's text.
pub fn read(path: &Path) -> Result<String> {
    Ok(cl_checkpoint::files::read_text(path, cl_checkpoint::files::MAX_CONFIG)?)
}

/// `f32` or `bf16` on a command line.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
}

impl From<Precision> for cl_train::Precision {
    fn from(p: Precision) -> Self {
        match p {
            Precision::F32 => cl_train::Precision::F32,
            Precision::Bf16 => cl_train::Precision::Bf16,
        }
    }
}
