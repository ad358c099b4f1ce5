//! The command line: arguments and subcommands. Results are written to `out`, progress to stderr.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cl_checkpoint::{Checkpoint, Interrupt, Manifest, ManifestProblem, TensorSource};
use cl_hub::{HubArgs, Located, Names, Part};
use indicatif::{ProgressBar, ProgressStyle};

pub use crate::adapter::cli::{AdapterCommand, run_adapter};
use crate::diff::{TensorDiff, diff};
use crate::methods::{Base, METHODS};
use crate::plan::{Plan, notes_without_models};
use crate::recipe::config::{MergeFile, model_and_adapter};
use crate::recipe::places::Named;
use crate::recipe::registry::{MethodRegistry, method};
pub use crate::report::bytes;
use crate::report::{size, write_json};
use crate::run::estimate::estimate;
use crate::run::options::MergeOptions;
use crate::run::stages::{self, Event, check_output, run_file};

/// Subcommands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Run a merge file: TOML, or mergekit's YAML.
    Run(RunArgs),
    /// Compare two models tensor by tensor: norms, cosine, opposite signs.
    Diff(DiffArgs),
    /// Check a model directory against its manifest, and that all values are finite.
    Verify(VerifyArgs),
    /// List all methods with formula, source and parameters.
    Methods(MethodsArgs),
    /// Combine, fold, extract, describe and compare LoRA adapters.
    #[command(subcommand)]
    Adapter(AdapterCommand),
}

/// Arguments of `run`.
#[derive(clap::Args)]
pub struct RunArgs {
    /// Merge file: TOML, or mergekit's YAML if its extension is .yml or .yaml.
    config: PathBuf,
    /// Model directory to write.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Memory limit, such as 800MiB or 2GiB.
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    memory: u64,
    /// Number of threads; 0 for all cores. It does not change the result.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Maximum size of a weights file, such as 5GB.
    #[arg(long, default_value = "5GB", value_parser = bytes)]
    max_shard_size: u64,
    /// Print what would be read and written, memory and time, or all problems, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Replace the output if all of its files were written by this program or are part of a model.
    #[arg(long)]
    overwrite: bool,
    /// Record hashes of the input files in the manifest.
    #[arg(long)]
    hash_inputs: bool,
    /// Allow NaN and infinities in tensors that are copied unchanged; merged values must be finite.
    #[arg(long)]
    allow_non_finite: bool,
}

/// Arguments of `diff`.
#[derive(clap::Args)]
pub struct DiffArgs {
    /// First model directory.
    a: PathBuf,
    /// Second model directory.
    b: PathBuf,
    /// Compare task vectors, the differences from this base, instead of weights.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `verify`.
#[derive(clap::Args)]
pub struct VerifyArgs {
    /// Model directory.
    dir: PathBuf,
}

/// Arguments of `methods`.
#[derive(clap::Args)]
pub struct MethodsArgs {
    /// Print only this method.
    name: Option<String>,
}

impl Command {
    /// Whether the command decomposes matrices. Commands that work entry by entry allocate little memory and do not
    /// need the restart of [`give_memory_back`].
    ///
    /// A merge file that is not a regular file is not read, because a pipe can be read only once.
    pub fn decomposes(&self) -> bool {
        match self {
            Command::Run(args) => {
                let file = args.config.is_file().then(|| MergeFile::read(&args.config).ok()).flatten();
                file.is_some_and(|f| f.stages.iter().any(|s| method(&s.method.name).is_some_and(|m| m.decomposes)))
            }
            Command::Adapter(_) => true,
            Command::Diff(_) | Command::Verify(_) | Command::Methods(_) => false,
        }
    }

    /// Whether the command stops by itself when that is requested. Signals should end all others.
    pub fn stops_on_request(&self) -> bool {
        match self {
            Command::Run(_) => true,
            Command::Adapter(command) => command.stops_on_request(),
            Command::Diff(_) | Command::Verify(_) | Command::Methods(_) => false,
        }
    }

    /// Sets the number of threads of the commands that have `--threads`, unless it was given.
    pub fn default_threads(&mut self, threads: usize) {
        match self {
            Command::Run(args) if args.threads == 0 => args.threads = threads,
            Command::Adapter(command) => command.default_threads(threads),
            _ => {}
        }
    }
}

/// Restarts this program once, with glibc's allocator set to return every freed block of 4 MiB or more to the system.
///
/// By default glibc keeps larger and larger blocks, and a merge that decomposes matrices takes two to three times the
/// memory it needs. Settings of the user are kept. Results do not depend on the setting.
///
/// Call it first in `main`: on success it does not return. If it fails, and on systems without glibc, it does nothing.
pub fn give_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if let Ok(program) = std::env::current_exe() {
        use std::os::unix::process::CommandExt;
        const ALLOCATOR: [&str; 2] = ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"];
        if ALLOCATOR.iter().any(|name| std::env::var_os(name).is_some()) {
            return;
        }
        let mut arguments = std::env::args_os();
        let mut command = std::process::Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        let _failure = command.args(arguments).env(ALLOCATOR[0], (4 << 20).to_string()).exec();
    }
}

/// Runs a command.
///
/// # Errors
/// Returns an error if the command fails or `out` cannot be written.
pub fn run(command: &Command, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    match command {
        Command::Run(args) => run_merge(args, interrupt, out),
        Command::Diff(args) => run_diff(args, interrupt, out),
        Command::Verify(args) => run_verify(args, out),
        Command::Methods(args) => run_methods(args, out),
        Command::Adapter(command) => run_adapter(command, interrupt, out),
    }
}

fn run_merge(args: &RunArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let mut file = MergeFile::read(&args.config)?;
    let options = MergeOptions {
        memory: usize::try_from(args.memory).context("--memory is beyond what can be addressed")?,
        threads: args.threads,
        max_shard_size: args.max_shard_size,
        overwrite: args.overwrite,
        hash_inputs: args.hash_inputs,
        allow_non_finite: args.allow_non_finite,
        interrupt: interrupt.clone(),
    };
    if args.dry_run {
        if let Some(dir) = &args.out {
            check_output(&file, dir, args.overwrite)?;
        }
        if !list_downloads(&file, &args.hub.names(interrupt), out)? {
            return Ok(());
        }
        find_models(&mut file, &args.hub.names(interrupt))?;
        return dry_run(&file, &options, out);
    }
    let dir = args.out.as_ref().context("--out says where the merged model goes")?;
    // Checked before the download, which can take long.
    check_output(&file, dir, args.overwrite)?;
    find_models(&mut file, &args.hub.names(interrupt))?;
    let bar = bar();
    let observe = |event: Event<'_>| match event {
        Event::Stage(name, bytes) => {
            bar.set_length(bytes);
            bar.set_message(name.to_owned());
            bar.set_position(0);
        }
        Event::Kept(name) => bar.println(format!("stage {name}: finished by an earlier run, kept")),
        Event::Written(bytes) => bar.set_position(bytes),
        Event::Note(note) => bar.suspend(|| tracing::warn!("{note}")),
    };
    let summary = run_file(&file, dir, &options, &observe)?;
    bar.finish_and_clear();
    let copied = if summary.copied > 0 { format!(" ({} copied unchanged)", summary.copied) } else { String::new() };
    writeln!(out, "{}: {} tensors{copied}, {}", dir.display(), summary.tensors, size(summary.bytes))?;
    Ok(())
}

/// Locates the hub models that a merge file names, and downloads missing files.
fn find_models(file: &mut MergeFile, names: &Names) -> Result<()> {
    for named in file.named() {
        if let Located { dir, commit: Some(commit) } = names.locate(&named.pinned, part(&named))? {
            file.place(&named.written, dir, &commit);
        }
    }
    Ok(())
}

/// Prints what a merge would download. Returns whether all files are in the cache, so that the merge can be planned.
fn list_downloads(file: &MergeFile, names: &Names, out: &mut dyn Write) -> Result<bool> {
    let mut there = true;
    for named in file.named() {
        let Some(plan) = names.plan(&named.pinned, part(&named))? else { continue };
        writeln!(out, "{}: {}", named.written, plan.summary())?;
        there &= plan.files == 0;
    }
    if !there {
        writeln!(out, "nothing was downloaded or written; the merge can be planned after the download")?;
    }
    Ok(there)
}

fn part(named: &Named) -> Part {
    if named.adapter { Part::Adapter } else { Part::Model }
}

fn dry_run(file: &MergeFile, options: &MergeOptions, out: &mut dyn Write) -> Result<()> {
    let methods = MethodRegistry::builtin();
    stages::check(file)?;
    if file.stages.len() > 1 {
        stages::check_all(file, &methods, options)?;
    }
    for stage in &file.stages {
        let title = stages::title(stage);
        let named = |model: &&str| file.stages.iter().any(|s| s.name.as_deref() == Some(model_and_adapter(model).0));
        if let Some(earlier) = stage.written_models().into_iter().find(named) {
            writeln!(
                out,
                "{title}: uses the result of stage {earlier}; memory and time can be estimated when that exists"
            )?;
            let notes = notes_without_models(stage, &methods)?;
            notes.iter().try_for_each(|note| writeln!(out, "  note    {note}"))?;
            continue;
        }
        let plan = Plan::new(stage)?;
        let estimate = estimate(&plan, options)?;
        let tensors = plan.tensors();
        let mut dtypes: Vec<String> = tensors.iter().map(|t| format!("{:?}", t.dtype)).collect();
        dtypes.sort();
        dtypes.dedup();
        writeln!(out, "{title}")?;
        writeln!(out, "  method  {}, {}", plan.method.name, plan.method.paper)?;
        writeln!(out, "  reads   {} from {} models", size(estimate.bytes_read), plan.models().count())?;
        writeln!(
            out,
            "  writes  {} in {} tensors of {}",
            size(estimate.bytes_written),
            tensors.len(),
            dtypes.join(", ")
        )?;
        writeln!(
            out,
            "  memory  {} MiB at most, of {} MiB allowed",
            estimate.peak_memory.div_ceil(1 << 20),
            options.memory >> 20
        )?;
        match &estimate.measured_on {
            Some(tensor) => {
                writeln!(out, "  time    about {:.1} s, estimated by merging {tensor}", estimate.time.as_secs_f64())?
            }
            None => writeln!(out, "  time    about {:.1} s, all tensors are copied", estimate.time.as_secs_f64())?,
        }
        for note in &plan.notes {
            writeln!(out, "  note    {note}")?;
        }
    }
    writeln!(out, "no problems found; nothing was written")?;
    Ok(())
}

fn run_diff(args: &DiffArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let names = args.hub.names(interrupt);
    let model = |path: &PathBuf| names.directory(path, Part::Model);
    let base = args.base.as_ref().map(model).transpose()?;
    let diff = diff(&model(&args.a)?, &model(&args.b)?, base.as_deref())?;
    if args.json {
        return write_json(out, &diff);
    }
    let width = diff.tensors.iter().map(|t| t.tensor.len()).max().unwrap_or(0).max(6);
    writeln!(
        out,
        "{:width$}  {:>10}  {:>10}  {:>10}  {:>9}  {:>9}  {:>10}",
        "tensor", "|a|", "|b|", "|a-b|", "cosine", "opposite", "max"
    )?;
    let mut row = |name: &str, t: &TensorDiff| {
        writeln!(
            out,
            "{name:width$}  {:>10.4}  {:>10.4}  {:>10.4}  {:>9.6}  {:>8.3}%  {:>10.3e}",
            t.norm_a,
            t.norm_b,
            t.norm_diff,
            t.cosine,
            100.0 * t.sign_conflict,
            t.max_diff
        )
    };
    for t in &diff.tensors {
        row(&t.tensor, t)?;
    }
    row("all", &diff.total)?;
    for (what, names) in [
        ("only in the first", &diff.only_a),
        ("only in the second", &diff.only_b),
        ("not compared (other shape, or integers)", &diff.not_compared),
    ] {
        for name in names {
            writeln!(out, "{what}: {name}")?;
        }
    }
    Ok(())
}

fn run_verify(args: &VerifyArgs, out: &mut dyn Write) -> Result<()> {
    let dir = &args.dir;
    let mut problems: Vec<String> = Vec::new();
    for problem in Manifest::verify(dir)? {
        problems.push(match problem {
            ManifestProblem::Missing(path) => format!("{}: is listed in the manifest but missing", path.display()),
            ManifestProblem::Changed(path) => format!("{}: has changed since it was written", path.display()),
            ManifestProblem::Unlisted(path) => format!("{}: is not listed in the manifest", path.display()),
        });
    }
    match Checkpoint::open(dir) {
        Ok(checkpoint) => {
            problems.extend(checkpoint.check_all_finite().err().map(|e| e.to_string()));
            writeln!(
                out,
                "{}: {} tensors in {} weights file(s)",
                dir.display(),
                checkpoint.names().len(),
                checkpoint.files().count()
            )?;
        }
        Err(error) => problems.push(error.to_string()),
    }
    for problem in &problems {
        writeln!(out, "problem: {problem}")?;
    }
    if problems.is_empty() {
        writeln!(out, "no problems found: unchanged since it was written, all values are finite")?;
        return Ok(());
    }
    bail!("{}: {} problem{} found", dir.display(), problems.len(), if problems.len() == 1 { "" } else { "s" })
}

fn run_methods(args: &MethodsArgs, out: &mut dyn Write) -> Result<()> {
    let chosen: Vec<_> = METHODS.iter().filter(|m| args.name.as_deref().is_none_or(|name| name == m.name)).collect();
    if chosen.is_empty() {
        bail!("no method is called `{}`; `methods` without a name lists all", args.name.as_deref().unwrap_or_default());
    }
    for info in chosen {
        writeln!(out, "{}: {}. {}", info.name, info.title, info.paper)?;
        writeln!(out, "    {}", info.formula)?;
        let (least, most) = (info.models.start(), info.models.end());
        let models = if least == most { format!("{least}") } else { format!("{least} or more") };
        let base = match info.base {
            Base::Required => "and a base",
            Base::Optional => "and a base, or none",
            Base::Input => "a base is one of them",
        };
        writeln!(out, "    models: {models}, {base}")?;
        for name in info.parameters {
            if let Some(parameter) = info.parameter(name) {
                writeln!(out, "    {name}: {}; {}", parameter.meaning, parameter.range)?;
            }
        }
    }
    Ok(())
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {eta}").expect("a valid template");
    ProgressBar::new(0).with_style(style)
}
