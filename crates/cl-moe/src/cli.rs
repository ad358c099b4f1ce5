//! The command: argument types and their implementation. Results are written to `out`, progress to stderr.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cl_checkpoint::Interrupt;
use cl_hub::{HubArgs, Names, Part};
use cl_merge::cli::bytes;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{BlendConfig, BlendPlan, ExpertStorage, MixConfig, MixOptions, Plan, blend, mix};

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
    /// Configuration: TOML, or mergekit-moe YAML if its extension is .yml or .yaml.
    config: PathBuf,
    /// Model directory to write.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Expert storage; overrides `expert_storage` in the configuration: full, or lowrank:R or bitdelta for the base's
    /// weights and compressed differences from them.
    #[arg(long, value_name = "STORAGE")]
    experts: Option<ExpertStorage>,
    /// Output file of `cl moe states`, from which routers are initialized; overrides `router.states` in the
    /// configuration.
    #[arg(long, value_name = "FILE")]
    states: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Memory limit, such as 800MiB or 2GiB.
    #[arg(long, default_value = "2GiB", value_parser = bytes)]
    memory: u64,
    /// Number of threads; 0 for all cores. It does not change the result.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print what would be written, memory, or all problems, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Replace the output if all of its files were written by this program or are part of a model.
    #[arg(long)]
    overwrite: bool,
}

impl MixArgs {
    /// Sets the number of threads, unless it was given.
    pub fn default_threads(&mut self, threads: usize) {
        if self.threads == 0 {
            self.threads = threads;
        }
    }
}

/// Arguments of `blend`.
#[derive(clap::Args)]
pub struct BlendArgs {
    /// Configuration: TOML.
    config: PathBuf,
    /// Directory of the mixture to write; it can be passed to other commands as --adapter.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
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

/// Replaces model names by directories, and downloads missing files.
///
/// # Errors
/// Returns an error if a model is neither a directory nor on the hub, or a download fails.
pub fn find_models(config: &mut MixConfig, names: &Names) -> Result<()> {
    find(models(config), names)
}

/// Like [`find_models`], for a mixture of adapters.
///
/// # Errors
/// Returns the errors of [`find_models`].
pub fn find_adapters(config: &mut BlendConfig, names: &Names) -> Result<()> {
    find(parts(config), names)
}

fn run_mix(args: &MixArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let mut config = MixConfig::read(&args.config)?;
    let names = args.hub.names(interrupt);
    if args.dry_run && !list_downloads(models(&mut config), &names, out)? {
        return Ok(());
    }
    find(models(&mut config), &names)?;
    config.expert_storage = args.experts.unwrap_or(config.expert_storage);
    config.router.states = args.states.clone().or(config.router.states);
    let plan = Plan::new(&config)?;
    let options = MixOptions {
        overwrite: args.overwrite,
        memory: usize::try_from(args.memory).context("--memory is beyond what can be addressed")?,
        threads: args.threads,
        interrupt: interrupt.clone(),
        ..MixOptions::default()
    };
    let memory = plan.peak_memory(&options)?;
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
        writeln!(out, "memory {} MiB at most, of {} MiB allowed", memory.div_ceil(1 << 20), args.memory >> 20)?;
        writeln!(out, "{total} M parameters, {active} M of them active")?;
        if let Some(bytes) = info.bytes {
            let ratio = bytes.total_bytes as f64 / bytes.base_bytes as f64;
            writeln!(out, "{ratio:.2} times the base's bytes, experts stored as {}", config.expert_storage)?;
        }
        writeln!(out, "no problems found; nothing was written")?;
        return Ok(());
    }
    let dir = args.out.as_ref().context("--out is required without --dry-run")?;
    let bar = bar(plan.bytes_written());
    let summary = mix(&plan, dir, &options, &|bytes| bar.set_position(bytes))?;
    bar.finish_and_clear();
    writeln!(out, "{}: {} tensors, {total} M parameters, {active} M of them active", dir.display(), summary.tensors)?;
    Ok(())
}

fn run_blend(args: &BlendArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let mut config = BlendConfig::read(&args.config)?;
    let names = args.hub.names(interrupt);
    if args.dry_run && !list_downloads(parts(&mut config), &names, out)? {
        return Ok(());
    }
    find(parts(&mut config), &names)?;
    // Check the output first, because extracting adapters from models takes time.
    if let Some(dir) = &args.out {
        config.check_output(dir, args.overwrite)?;
    }
    let plan = BlendPlan::interruptible(&config, args.ignore_base, interrupt)?;
    for note in &plan.notes {
        writeln!(out, "note: {note}")?;
    }
    if args.dry_run {
        writeln!(out, "writes {} tensors, {} bytes", plan.tensors().len(), plan.bytes_written())?;
        writeln!(out, "{}", plan.summary())?;
        writeln!(out, "no problems found; nothing was written")?;
        return Ok(());
    }
    let dir = args.out.as_ref().context("--out is required without --dry-run")?;
    blend(&plan, dir, args.overwrite, interrupt)?;
    writeln!(out, "{}: {}", dir.display(), plan.summary())?;
    Ok(())
}

/// The base and the experts of a mixture.
fn models(config: &mut MixConfig) -> impl Iterator<Item = (&mut PathBuf, Part)> {
    let shared = config.shared_expert.iter_mut().map(|expert| &mut expert.model);
    let experts = shared.chain(config.experts.iter_mut().map(|expert| &mut expert.model));
    std::iter::once(&mut config.base_model).chain(experts).map(|path| (path, Part::Model))
}

/// The base of a mixture of adapters, and its adapters and models.
fn parts(config: &mut BlendConfig) -> impl Iterator<Item = (&mut PathBuf, Part)> {
    let experts = config.experts.iter_mut().flat_map(|expert| {
        let adapter = expert.adapter.as_mut().map(|dir| (dir, Part::Adapter));
        adapter.into_iter().chain(expert.model.as_mut().map(|dir| (dir, Part::Model)))
    });
    let general = config.general_adapters.iter_mut().map(|dir| (dir, Part::Adapter));
    std::iter::once((&mut config.base_model, Part::Model)).chain(experts).chain(general)
}

/// Replaces names by directories, and downloads missing files.
fn find<'a>(names_of: impl Iterator<Item = (&'a mut PathBuf, Part)>, names: &Names) -> Result<()> {
    for (path, part) in names_of {
        *path = names.directory(path, part)?;
    }
    Ok(())
}

/// Prints the pending downloads. Returns whether all files are in the cache, so that the mixture can be planned.
fn list_downloads<'a>(
    names_of: impl Iterator<Item = (&'a mut PathBuf, Part)>,
    names: &Names,
    out: &mut dyn Write,
) -> Result<bool> {
    let mut there = true;
    for (path, part) in names_of {
        let Some(plan) = names.plan(&path.to_string_lossy(), part)? else { continue };
        writeln!(out, "{}: {}", path.display(), plan.summary())?;
        there &= plan.files == 0;
    }
    if !there {
        writeln!(out, "nothing was downloaded or written; the mixture can be planned after the download")?;
    }
    Ok(there)
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
