//! The command: argument types, and what they do. Results go to `out`, progress to stderr.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cl_checkpoint::Interrupt;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{BlendConfig, BlendPlan, ExpertStorage, MixConfig, MixOptions, Plan, blend, mix};

/// What can be done.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a mixture of experts of a base and models tuned from it: TOML, or mergekit-moe's YAML.
    Mix(MixArgs),
    /// Make a mixture of experts of LoRA adapters of one base, with a router per linear layer: TOML.
    Blend(BlendArgs),
}

/// Arguments of `mix`.
#[derive(clap::Args)]
pub struct MixArgs {
    /// Configuration: TOML, or mergekit-moe's YAML by its ending .yml or .yaml.
    config: PathBuf,
    /// Model directory to write.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// How experts are stored, in place of the configuration's `expert_storage`: full; lowrank:R or bitdelta for the base's
    /// weights and compressed differences from them.
    #[arg(long, value_name = "STORAGE")]
    experts: Option<ExpertStorage>,
    /// Say what would be written, and everything that stands in the way; write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Replace the output if it is a model that holds nothing else.
    #[arg(long)]
    overwrite: bool,
}

/// Arguments of `blend`.
#[derive(clap::Args)]
pub struct BlendArgs {
    /// Configuration, TOML.
    config: PathBuf,
    /// Directory of the mixture to write; commands that take --adapter take it.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Say what would be written, and everything that stands in the way; write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Take adapters whose manifests name another base.
    #[arg(long)]
    ignore_base: bool,
    /// Replace the output if it is a mixture that holds nothing else.
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
    let config = MixConfig::read(&args.config)?;
    let expert_storage = args.experts.unwrap_or(config.expert_storage);
    let plan = Plan::new(&MixConfig { expert_storage, ..config })?;
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
        if let Some(bytes) = info.bytes {
            let ratio = bytes.total_bytes as f64 / bytes.base_bytes as f64;
            writeln!(out, "{ratio:.2} times the base's bytes, experts stored as {expert_storage}")?;
        }
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
