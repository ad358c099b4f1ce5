use std::path::PathBuf;

use anyhow::Result;
use cl_checkpoint::gguf::{ImportOptions, import};
use cl_checkpoint::Dtype;

/// Arguments of `cl import-gguf`.
#[derive(clap::Args)]
pub struct Args {
    /// The GGUF file.
    file: PathBuf,
    /// Model directory to make.
    out: PathBuf,
    /// Dtype of the tensors.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: To,
    /// Replace OUT when it exists.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum To {
    Bf16,
    F16,
    F32,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let dtype = match args.dtype {
        To::Bf16 => Dtype::BF16,
        To::F16 => Dtype::F16,
        To::F32 => Dtype::F32,
    };
    let report = import(&args.file, &args.out, &ImportOptions { dtype, overwrite: args.overwrite })?;
    println!(
        "{}: {} tensors, {:.1} M parameters, {} tokens in the vocabulary ({})",
        args.out.display(),
        report.tensors,
        report.parameters as f64 / 1e6,
        report.vocab_size,
        report.architecture
    );
    Ok(())
}
