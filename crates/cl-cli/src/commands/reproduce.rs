use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::reproduce::{Args, StudyProfile};
use cl_lab::{PAPER_STUDY, SMOL_STUDY, StudyConfig, StudySizes, TinyConfig, read_study, sketch_study};

use super::study::{options, print_plan, run_stages};
use crate::progress::Progress;

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    match args.profile {
        StudyProfile::Tiny => tiny(args, log, interrupt, out),
        StudyProfile::Smol => given(args, "smol", SMOL_STUDY, log, interrupt, out),
        StudyProfile::Paper => given(args, "paper", PAPER_STUDY, log, interrupt, out),
    }
}

fn tiny(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    for (set, name) in
        [(args.model.is_some(), "--model"), (args.data.is_some(), "--data"), (args.limit.is_some(), "--limit")]
    {
        if set {
            bail!(
                "{name} is for --profile smol and --profile paper; the profile tiny generates its own model and data"
            );
        }
    }
    let size = if args.quick { TinyConfig::quick() } else { TinyConfig::default() };
    let tiny = TinyConfig { seed: args.seed, ..size };
    // For such a small model, a second thread saves only a fifth of the time, and on a busy machine, threads that wait
    // for each other cost minutes.
    cl_torch::set_threads(1);
    if args.stages.dry_run && !args.out.join("base/model/manifest.json").exists() {
        let sketch = tempfile::tempdir()?;
        tiny.write_sketch(sketch.path())?;
        return run_stages(&args.stages, &tiny.study(sketch.path()), &args.out, None, log, interrupt, out);
    }
    let mut progress = Progress::new(log);
    tiny.write_world(&args.out, interrupt, &mut |event| progress.observe(event))?;
    // Training such a small model needs little memory, so one stage per core can run.
    let jobs = args.stages.jobs.or_else(|| std::thread::available_parallelism().ok());
    run_stages(&args.stages, &tiny.study(&args.out), &args.out, jobs, log, interrupt, out)
}

/// Runs a study with the user's model and data.
fn given(args: &Args, name: &str, text: &str, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    if args.quick {
        bail!("--quick is for --profile tiny; use --limit or --only with the profile {name}");
    }
    let mut config = read_study(Path::new(&format!("examples/configs/{name}.toml")), text, &[])?;
    if let Some(limit) = args.limit {
        let limit = Some(usize::try_from(limit)?);
        (config.limit.train, config.limit.test, config.limit.old) = (limit, limit, limit);
    }
    match (&args.model, &args.data) {
        (Some(model), Some(data)) if has_weights(model) => {
            config.model.clone_from(model);
            let trace = data.join("trace");
            config.data = if trace.is_dir() { trace } else { data.clone() };
            // MetaMathQA is next to TRACE's directory.
            let beside =
                config.rounds.iter_mut().flat_map(|round| &mut round.data).filter(|path| data.join(path).exists());
            beside.for_each(|path| *path = data.join(&*path));
            run_stages(&args.stages, &config, &args.out, args.stages.jobs, log, interrupt, out)
        }
        (model, _) if args.stages.dry_run && args.profile == StudyProfile::Paper => {
            sketch(&config, model.as_deref(), args, out)
        }
        (Some(model), Some(_)) => bail!("{}: no weights found; --model must be a model directory", model.display()),
        _ => bail!("--profile {name} needs --model DIR and --data DIR"),
    }
}

fn has_weights(model: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| model.join(name).exists())
}

/// Prints the plan of the paper's study, for which neither model nor data have to exist. If there is a `config.json`,
/// it is used instead of that of Llama-3-8B.
fn sketch(config: &StudyConfig, model: Option<&Path>, args: &Args, out: &mut impl Write) -> Result<()> {
    let options = options(&args.stages, None)?;
    let mut sizes = StudySizes::of_paper();
    if let Some(model) = model {
        let path = if model.is_dir() { model.join("config.json") } else { model.to_owned() };
        sizes.model = serde_json::from_str(&super::read(&path)?)?;
    }
    if let Some(limit) = config.limit.train {
        sizes.rounds.iter_mut().flatten().for_each(|set| set.rows = set.rows.min(limit));
    }
    writeln!(
        out,
        "model and data are not read: numbers of rows and documents are the paper's, lengths are estimated from samples"
    )?;
    print_plan(&sketch_study(config, &sizes, &options)?, out)
}
