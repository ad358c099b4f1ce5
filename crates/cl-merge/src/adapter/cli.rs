//! The subcommands for adapters: argument types and implementation. Results and notes are written to `out`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cl_checkpoint::{Checkpoint, Interrupt, Manifest};
use cl_hub::{HubArgs, HubError, Names, Part};
use serde_json::{Map, Value, json};

use super::combine::combine;
use super::compare::{ModuleDiff, compare};
use super::extract::{ExtractOptions, ExtractReport, extract};
use super::fold::{FoldOptions, FoldReport, ModuleDrift, check_output, fold_with};
use super::info::{AdapterInfo, info};
use super::options::{CombineOptions, Space};
use super::report::{CombineReport, ModuleReport};
use super::set::open;
use crate::methods::{Election, Profile};
use crate::recipe::config::{FloatType, Parameters};
use crate::recipe::parameter::Parameter;
use crate::report::{bytes, write_json};

/// Subcommands of `adapter`.
#[derive(clap::Subcommand)]
pub enum AdapterCommand {
    /// Combine adapters into one: by exact sums, or by any merge method on their updates.
    Combine(CombineArgs),
    /// Fold adapters into their base, with one rounding.
    Fold(FoldArgs),
    /// Extract a LoRA adapter from a fine-tuned model and its base.
    Extract(ExtractArgs),
    /// Describe an adapter: ranks, scalings, norms of its updates.
    Info(InfoArgs),
    /// Compare two adapters: norms, cosine, overlap of their subspaces.
    Diff(DiffArgs),
}

impl AdapterCommand {
    /// Whether the command stops by itself when that is requested. Signals should end all others.
    pub fn stops_on_request(&self) -> bool {
        !matches!(self, AdapterCommand::Info(_) | AdapterCommand::Diff(_))
    }

    /// Sets the number of threads of the commands that have `--threads`, unless it was given.
    pub fn default_threads(&mut self, threads: usize) {
        let own = match self {
            AdapterCommand::Combine(args) => &mut args.threads,
            AdapterCommand::Fold(args) => &mut args.threads,
            AdapterCommand::Extract(args) => &mut args.threads,
            AdapterCommand::Info(_) | AdapterCommand::Diff(_) => return,
        };
        if *own == 0 {
            *own = threads;
        }
    }
}

/// Arguments of `adapter combine`.
#[derive(clap::Args)]
pub struct CombineArgs {
    /// Adapter directories.
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    /// Method: cat, linear, ties, dare_ties, dare_linear, magnitude_prune, task_arithmetic, della, breadcrumbs, sce, magmax, tsv, knots
    /// and others; those of models are described by `cl-merge methods`.
    #[arg(long, default_value = "linear")]
    method: String,
    /// Adapter directory to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// One weight per adapter, such as 1,0.5; defaults to 1.
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true)]
    weights: Vec<f64>,
    /// Fraction of entries to keep, above 0 and at most 1: one for all adapters, or one per adapter.
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true)]
    density: Vec<f64>,
    /// Scale of the merged update.
    #[arg(long, allow_hyphen_values = true)]
    lambda: Option<f64>,
    /// Elect signs by the sum of values (total) or of signs (frequency).
    #[arg(long, value_enum)]
    sign: Option<Majority>,
    /// Another parameter of the method, such as epsilon=0.1; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Maximum rank of the output; by default, sums keep the full rank, and other methods the largest rank of an input.
    #[arg(long)]
    rank: Option<usize>,
    /// Combine updates (delta), or A and B separately as in PEFT (factors). Defaults to delta; with `--profile paper`, to
    /// factors for the methods that the paper applied to them (ties, dare_ties).
    #[arg(long, value_enum)]
    space: Option<SpaceName>,
    /// Profile that selects the default definitions.
    #[arg(long, value_enum, default_value = "method")]
    profile: ProfileName,
    /// Random seed of masks.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Base model of the adapters, to check modules, shapes and stored weights.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Combine adapters even if their manifests name different bases.
    #[arg(long)]
    ignore_base: bool,
    /// Memory limit, such as 800MiB or 2GiB.
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    memory: u64,
    /// Number of threads; 0 for all cores. It does not change the result.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Element type of the output: float32, float16 or bfloat16.
    #[arg(long, default_value = "float32", value_parser = float_type)]
    dtype: FloatType,
    /// Replace the output if it exists.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    hub: HubArgs,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `adapter fold`.
#[derive(clap::Args)]
pub struct FoldArgs {
    /// Base model directory.
    base: PathBuf,
    /// Adapter directories.
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    /// Model directory to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// One weight per adapter, such as 1,0.5; defaults to 1.
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true)]
    weights: Vec<f64>,
    /// Also report how much the result would differ if adapters were folded one by one, with rounding after each.
    #[arg(long)]
    drift: bool,
    /// Fold adapters even if their manifests name another base.
    #[arg(long)]
    ignore_base: bool,
    /// Number of threads; 0 for all cores. It does not change the result.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Maximum size of a weights file, such as 5GB.
    #[arg(long, default_value = "5GB", value_parser = bytes)]
    max_shard_size: u64,
    /// Replace the output if it exists.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    hub: HubArgs,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `adapter extract`.
#[derive(clap::Args)]
pub struct ExtractArgs {
    /// Base model directory.
    base: PathBuf,
    /// Fine-tuned model directory.
    tuned: PathBuf,
    /// Maximum rank of each module.
    #[arg(long)]
    rank: usize,
    /// Adapter directory to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Modules by name or name suffix, such as q_proj,v_proj,lm_head; all-linear for all linear layers except the head.
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// Modules to store in full where they differ, such as norm,embed_tokens: all whose name ends in an entry, as in PEFT.
    #[arg(long, value_delimiter = ',', value_name = "MODULES")]
    modules_to_save: Vec<String>,
    /// Element type of the output: float32, float16 or bfloat16.
    #[arg(long, default_value = "float32", value_parser = float_type)]
    dtype: FloatType,
    /// Memory limit, such as 800MiB or 2GiB.
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    memory: u64,
    /// Number of threads; 0 for all cores. It does not change the result.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Replace the output if it exists.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    hub: HubArgs,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `adapter info`.
#[derive(clap::Args)]
pub struct InfoArgs {
    /// Adapter directory.
    dir: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `adapter diff`.
#[derive(clap::Args)]
pub struct DiffArgs {
    /// First adapter directory.
    a: PathBuf,
    /// Second adapter directory.
    b: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum SpaceName {
    Delta,
    Factors,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum ProfileName {
    Method,
    Paper,
    Mergekit,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Majority {
    Total,
    Frequency,
}

/// Runs a command.
///
/// # Errors
/// Returns an error if the command fails or `out` cannot be written.
pub fn run_adapter(command: &AdapterCommand, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    match command {
        AdapterCommand::Combine(args) => run_combine(args, interrupt, out),
        AdapterCommand::Fold(args) => run_fold(args, interrupt, out),
        AdapterCommand::Extract(args) => run_extract(args, interrupt, out),
        AdapterCommand::Info(args) => run_info(args, interrupt, out),
        AdapterCommand::Diff(args) => run_diff(args, interrupt, out),
    }
}

fn run_combine(args: &CombineArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let names = args.hub.names(interrupt);
    let adapters = directories(&names, &args.adapters)?;
    let options = CombineOptions {
        method: args.method.clone(),
        // Results must not depend on the location of the Hub's cache.
        names: if adapters == args.adapters {
            Vec::new()
        } else {
            args.adapters.iter().map(|a| a.display().to_string()).collect()
        },
        weights: args.weights.clone(),
        density: args.density.clone(),
        parameters: parameters(args)?,
        rank: args.rank,
        space: match args.space {
            Some(SpaceName::Delta) => Space::Delta,
            Some(SpaceName::Factors) => Space::Factors,
            None if matches!(args.profile, ProfileName::Paper) => Space::of_paper(&args.method),
            None => Space::Delta,
        },
        profile: match args.profile {
            ProfileName::Method => Profile::Method,
            ProfileName::Paper => Profile::Paper,
            ProfileName::Mergekit => Profile::Mergekit,
        },
        seed: args.seed,
        base: args.base.as_ref().map(|base| names.directory(base, Part::Model)).transpose()?,
        ignore_base: args.ignore_base,
        threads: args.threads,
        memory: size(args.memory)?,
        dtype: args.dtype,
        overwrite: args.overwrite,
        interrupt: interrupt.clone(),
    };
    let report = combine(&adapters, &args.out, &options)?;
    if args.json {
        return write_json(out, &report);
    }
    let CombineReport { method, modules, total, parameters, notes, adapters, space, whole } = &report;
    module_table(out, modules, total)?;
    for w in whole {
        writeln!(out, "fully trained: {} {:?}, |d| {:.4}", w.tensor, w.shape, w.norm)?;
    }
    write_notes(out, notes)?;
    let from = if *space == Space::Factors { " from the weighted sum" } else { "" };
    writeln!(
        out,
        "{}: {} adapters combined by {method}, {} modules, maximum rank {}, {parameters} parameters, energy {:.4}, \
         relative error {:.2e}{from}",
        args.out.display(),
        adapters.len(),
        modules.len(),
        total.rank,
        total.energy,
        total.relative_error
    )?;
    Ok(())
}

/// Collects the parameters from `--lambda`, `--sign` and `--set`.
fn parameters(args: &CombineArgs) -> Result<Parameters> {
    let mut map = Map::new();
    for text in &args.set {
        let (key, value) = text.split_once('=').with_context(|| format!("--set {text}: expected KEY=VALUE"))?;
        // Anything that does not parse as a number or boolean is a string.
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        if map.insert(key.trim().to_owned(), value).is_some() {
            bail!("--set {key}: is given twice");
        }
    }
    let flags =
        [("lambda", args.lambda.is_some()), ("election", args.sign.is_some()), ("density", !args.density.is_empty())];
    if let Some((key, _)) = flags.iter().find(|(key, given)| *given && map.contains_key(*key)) {
        bail!("--set {key}: is also set by its own option; remove one of them");
    }
    let mut parameters: Parameters =
        serde_json::from_value(Value::Object(map)).map_err(|e| anyhow::anyhow!("--set: {e}"))?;
    if let Some(lambda) = args.lambda {
        parameters.lambda = Some(Parameter::Number(lambda));
    }
    match args.sign {
        Some(Majority::Frequency) => parameters.election = Some(Election::Count),
        Some(Majority::Total) => parameters.election = Some(Election::Unweighted),
        None => {}
    }
    Ok(parameters)
}

fn run_fold(args: &FoldArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let names = args.hub.names(interrupt);
    let dirs = directories(&names, &args.adapters)?;
    let adapters = open(&dirs)?;
    let base_dir = names.directory(&args.base, Part::Model)?;
    let base = Checkpoint::open(&base_dir)?;
    // Check before the inputs are hashed, which takes time.
    check_output(&base, &adapters, &args.out, args.overwrite)?;
    let options = FoldOptions {
        weights: args.weights.clone(),
        threads: args.threads,
        max_shard_size: args.max_shard_size,
        overwrite: args.overwrite,
        interrupt: interrupt.clone(),
        ignore_base: args.ignore_base,
        drift: args.drift,
    };
    let mut manifest = Manifest::new("model").with_config(json!({ "fold": { "weights": args.weights } })).with_source(
        "base",
        &base_dir,
        base.content_hash()?,
    );
    for (dir, adapter) in dirs.iter().zip(&adapters) {
        manifest = manifest.with_source("adapter", dir, adapter.content_hash()?);
    }
    let report = fold_with(&base, &adapters, &args.out, manifest, &options)?;
    if args.json {
        return write_json(out, &report);
    }
    let FoldReport { folded, copied, max_rounding_error, drift, notes, untied: _ } = &report;
    if let Some(drift) = drift {
        drift_table(out, &drift.modules, &drift.total)?;
    }
    write_notes(out, notes)?;
    writeln!(
        out,
        "{}: {folded} tensors folded, {copied} copied unchanged, largest rounding error {max_rounding_error:.2e}",
        args.out.display()
    )?;
    Ok(())
}

fn drift_table(out: &mut dyn Write, modules: &[ModuleDrift], total: &ModuleDrift) -> Result<()> {
    let width = modules.iter().map(|m| m.module.len()).max().unwrap_or(0).max(6);
    writeln!(
        out,
        "{:width$}  {:>10}  {:>10}  {:>10}  {:>20}  {:>10}  {:>10}",
        "module", "max", "mean", "relative", "entries that differ", "once", "repeated"
    )?;
    for m in modules.iter().chain([total]) {
        let name = if m.module.is_empty() { "all" } else { &m.module };
        let share = 100.0 * m.differing as f64 / m.elements.max(1) as f64;
        writeln!(
            out,
            "{name:width$}  {:>10.3e}  {:>10.3e}  {:>10.3e}  {:>11} {share:>7.3}%  {:>10.3e}  {:>10.3e}",
            m.max, m.mean, m.relative, m.differing, m.once, m.repeated
        )?;
    }
    writeln!(
        out,
        "drift: folding one adapter after another, rounded each time, compared with one sum, rounded once (max, mean, \
         relative); and the error of each compared with the exact sum, relative to the norm of the update (once, repeated)"
    )?;
    Ok(())
}

fn run_extract(args: &ExtractArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let options = ExtractOptions {
        rank: args.rank,
        targets: args.targets.clone(),
        modules_to_save: args.modules_to_save.clone(),
        dtype: args.dtype,
        threads: args.threads,
        memory: size(args.memory)?,
        overwrite: args.overwrite,
        interrupt: interrupt.clone(),
    };
    let names = args.hub.names(interrupt);
    let [base, tuned] = [&args.base, &args.tuned].map(|dir| names.directory(dir, Part::Model));
    let report = extract(&base?, &tuned?, &args.out, &options)?;
    if args.json {
        return write_json(out, &report);
    }
    let ExtractReport { modules, total, saved, untouched, parameters, notes: _ } = &report;
    module_table(out, modules, total)?;
    for tensor in untouched {
        writeln!(out, "note: `{}` differs by {:.4} and is not in the adapter", tensor.tensor, tensor.norm)?;
    }
    writeln!(
        out,
        "{}: {} modules, maximum rank {}, {} tensors in full, {parameters} parameters, energy {:.4}, relative error {:.2e}, \
         {} differing tensors left out",
        args.out.display(),
        modules.len(),
        total.rank,
        saved.len(),
        total.energy,
        total.relative_error,
        untouched.len()
    )?;
    Ok(())
}

fn run_info(args: &InfoArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let info = info(&args.hub.names(interrupt).directory(&args.dir, Part::Adapter)?)?;
    if args.json {
        return write_json(out, &info);
    }
    write_info(out, &info)
}

fn write_info(out: &mut dyn Write, info: &AdapterInfo) -> Result<()> {
    let kinds = [(info.dora, "DoRA"), (info.rslora, "rsLoRA")];
    let kinds: Vec<&str> = kinds.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect();
    let kinds = if kinds.is_empty() { String::new() } else { format!(" with {}", kinds.join(" and ")) };
    writeln!(out, "{}: {}{kinds}", info.path, info.kind)?;
    writeln!(out, "  base        {}", info.base.as_deref().unwrap_or("not recorded"))?;
    writeln!(out, "  rank        {}, alpha {}", info.r, info.alpha)?;
    let targets = serde_json::to_string(&info.targets)?;
    writeln!(out, "  targets     {targets}")?;
    for (name, rank) in &info.rank_pattern {
        writeln!(out, "  rank of     {}: {rank}", name.key())?;
    }
    for (name, alpha) in &info.alpha_pattern {
        writeln!(out, "  alpha of    {}: {alpha}", name.key())?;
    }
    writeln!(out, "  parameters  {} in {}", info.parameters, info.dtypes.join(", "))?;
    if let Some(feature) = &info.unsupported {
        writeln!(out, "  note        {feature}: cannot be combined or folded")?;
    }
    for source in &info.sources {
        writeln!(out, "  source      {} {} {}", source.role, source.path, source.blake3.as_deref().unwrap_or(""))?;
    }
    let width = info.modules.iter().map(|m| m.module.len()).max().unwrap_or(0).max(6);
    writeln!(
        out,
        "{:width$}  {:>13}  {:>4}  {:>8}  {:>10}  {:>14}",
        "module", "weight", "rank", "scaling", "|dW|", "effective rank"
    )?;
    for m in &info.modules {
        writeln!(
            out,
            "{:width$}  {:>13}  {:>4}  {:>8.4}  {:>10.4}  {:>14.2}",
            m.module,
            format!("{}x{}", m.shape[0], m.shape[1]),
            m.rank,
            m.scaling,
            m.norm,
            m.effective_rank
        )?;
    }
    writeln!(out, "{:width$}  {:>13}  {:>4}  {:>8}  {:>10.4}", "all", "", "", "", info.norm)?;
    for b in &info.beside {
        writeln!(out, "other tensor: {} {:?} ({})", b.tensor, b.shape, b.kind)?;
    }
    Ok(())
}

fn run_diff(args: &DiffArgs, interrupt: &Interrupt, out: &mut dyn Write) -> Result<()> {
    let names = args.hub.names(interrupt);
    let [a, b] = [&args.a, &args.b].map(|dir| names.directory(dir, Part::Adapter));
    let diff = compare(&a?, &b?)?;
    if args.json {
        return write_json(out, &diff);
    }
    let width = diff.modules.iter().map(|m| m.module.len()).max().unwrap_or(0).max(6);
    writeln!(
        out,
        "{:width$}  {:>10}  {:>10}  {:>10}  {:>9}  {:>10}  {:>10}",
        "module", "|a|", "|b|", "|a-b|", "cosine", "overlap A", "overlap B"
    )?;
    let mut row = |name: &str, m: &ModuleDiff| {
        writeln!(
            out,
            "{name:width$}  {:>10.4}  {:>10.4}  {:>10.4}  {:>9.6}  {:>10.4}  {:>10.4}",
            m.norm_a, m.norm_b, m.norm_diff, m.cosine, m.overlap_a, m.overlap_b
        )
    };
    for m in &diff.modules {
        row(&m.module, m)?;
    }
    row("all", &diff.total)?;
    for (what, names) in [("only in the first", &diff.only_a), ("only in the second", &diff.only_b)] {
        for name in names {
            writeln!(out, "{what}: {name}")?;
        }
    }
    write_notes(out, &diff.notes)
}

fn module_table(out: &mut dyn Write, modules: &[ModuleReport], total: &ModuleReport) -> Result<()> {
    let width = modules.iter().map(|m| m.module.len()).max().unwrap_or(0).max(6);
    writeln!(out, "{:width$}  {:>5}  {:>10}  {:>8}  {:>14}", "module", "rank", "|dW|", "energy", "relative error")?;
    for m in modules.iter().chain([total]) {
        let name = if m.module.is_empty() { "all" } else { &m.module };
        writeln!(
            out,
            "{name:width$}  {:>5}  {:>10.4}  {:>8.4}  {:>14.3e}",
            m.rank, m.norm, m.energy, m.relative_error
        )?;
    }
    Ok(())
}

fn write_notes(out: &mut dyn Write, notes: &[String]) -> Result<()> {
    for note in notes {
        writeln!(out, "note: {note}")?;
    }
    Ok(())
}

/// Resolves adapter names to directories.
fn directories(names: &Names, adapters: &[PathBuf]) -> Result<Vec<PathBuf>, HubError> {
    adapters.iter().map(|dir| names.directory(dir, Part::Adapter)).collect()
}

fn size(bytes: u64) -> Result<usize> {
    usize::try_from(bytes).context("--memory is beyond what can be addressed")
}

fn float_type(text: &str) -> Result<FloatType, String> {
    serde_json::from_value(Value::from(text)).map_err(|_| format!("`{text}` is not one of float32, float16, bfloat16"))
}
