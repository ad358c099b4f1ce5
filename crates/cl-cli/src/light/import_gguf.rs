//! `cl import-gguf`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_checkpoint::gguf::{FloatDtype, ImportOptions, import};

/// Arguments of `cl import-gguf`.
#[derive(clap::Args)]
pub struct Args {
    /// The GGUF file.
    file: PathBuf,
    /// Model directory to write.
    out: PathBuf,
    /// Dtype of the tensors: bf16, f16 or f32 (rounded to nearest even).
    #[arg(long, default_value = "bf16")]
    dtype: FloatDtype,
    /// Replace OUT if it is a model directory without other files.
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let options = ImportOptions { dtype: args.dtype, overwrite: args.overwrite };
    let report = import(&args.file, &args.out, &options)?;
    for note in &report.notes {
        tracing::info!("note: {note}");
    }
    writeln!(
        out,
        "{}: {} model, {} tensors, {:.1} M parameters, {} tokens",
        args.out.display(),
        report.model_type,
        report.tensors,
        report.parameters as f64 / 1e6,
        report.tokens
    )?;
    Ok(())
}
