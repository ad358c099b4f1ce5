//! One command, one file: its arguments and what it does with them.

pub mod check;
pub mod compare;
pub mod eval;
pub mod generate;
pub mod import_gguf;
pub mod moe;
pub mod paper_tables;
pub mod reproduce;
pub mod sequence;
pub mod train;

use std::path::Path;

use anyhow::{Context, Result};

/// Reads a configuration's text.
pub fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{}: cannot read it as a configuration", path.display()))
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
