//! The command: argument types, and what they do. Results go to `out`, progress to stderr.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cl_checkpoint::Interrupt;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{BlendConfig, BlendPlan, MixConfig, MixOptions, Plan, blend, mix};

/// Subcommands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Build a mixture of experts from a base and models fine-tuned from it.
    Mix(MixArgs),
    /// Build a mixture of LoRA adapters of one base, with a router per linear layer.
    Blend(BlendArgs),
}

/// Arguments of `mix`.
#[derive(clap::Args)]
pub struct MixArgs {
    /// Configuration: TOML, or mergekit-moe's YAML if its extension is .yml or .yaml.
    config: PathBuf,
    /// Model directory to write.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Print what would be written, or all problems, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Replace the output if all of its files were written by this program or are part of a model.
    #[arg(long)]
    overwrite: bool,
}

/// Arguments of `blend`.
#[derive(clap::Args)]
pub struct BlendArgs {
    /// Configuration: TOML.
    config: PathBuf,
    /// Directory of the mixture to write; it can be passed to other commands as --adapter.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Print what would be written, or all problems, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Accept adapters whose manifests name another base.
    #[arg(long)]
    ignore_base: bool,
    /// Replace the output if all of its files were written by this program.
    #[arg(long)]
    overwrite: bool,
}

/// Runs a command.
///
/// # Errors
/// Returns an error if the command fails or `out` cannot be written.
pub fn run(command: &Command, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    match command {
        Command::Mix(args) => run_mix(args, interrupt, out),
        Command::Blend(args) => run_blend(args, interrupt, out),
    }
}

fn run_mix(args: &MixArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let plan = Plan::new(&MixConfig::read(&args.config)?)?;
    if let Some(dir) = &args.out {
        plan.check_output(dir, args.overwrite)?;
    }
    for note in &plan.notes {
        writeln!(out, "note: {note}")?;
    }
    let info = plan.info();
    let (total, active) = (millions(info.total_parameters), millions(info.active_parameters));
    if args.dry_run {
        writeln!(out, "writes {} tensors, {:.1} MB", plan.tensors().len(), plan.bytes_written() as f64 / 1e6)?;
        writeln!(out, "{total} M parameters, {active} M of them active")?;
        writeln!(out, "no problem found; nothing was written")?;
        return Ok(());
    }
    let dir = args.out.as_ref().context("--out says where the mixture goes")?;
    let bar = bar(plan.bytes_written());
    let options = MixOptions { overwrite: args.overwrite, interrupt: interrupt.clone(), ..MixOptions::default() };
    let summary = mix(&plan, dir, &options, &|bytes| bar.set_position(bytes))?;
    bar.finish_and_clear();
    writeln!(out, "{}: {} tensors, {total} M parameters, {active} M of them active", dir.display(), summary.tensors)?;
    Ok(())
}

fn run_blend(args: &BlendArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let plan = BlendPlan::new(&BlendConfig::read(&args.config)?, args.ignore_base)?;
    if let Some(dir) = &args.out {
        plan.check_output(dir, args.overwrite)?;
    }
    for note in &plan.notes {
        writeln!(out, "note: {note}")?;
    }
    if args.dry_run {
        writeln!(out, "writes {} tensors, {} bytes", plan.tensors().len(), plan.bytes_written())?;
        writeln!(out, "{}", plan.summary())?;
        writeln!(out, "no problem found; nothing was written")?;
        return Ok(());
    }
    let dir = args.out.as_ref().context("--out says where the mixture goes")?;
    blend(&plan, dir, args.overwrite, interrupt)?;
    writeln!(out, "{}: {}", dir.display(), plan.summary())?;
    Ok(())
}

fn millions(parameters: u64) -> String {
    format!("{:.1}", parameters as f64 / 1e6)
}

fn bar(bytes: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {eta}").expect("a valid template");
    ProgressBar::new(bytes).with_style(style)
}
