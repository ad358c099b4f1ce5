use std::io::Write;
use std::num::NonZero;
use std::path::Path;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::study::{Args, StageArgs};
use cl_cli::light::report;
use cl_lab::{StudyConfig, StudyOptions, plan_study, read_study, run_study};

use crate::progress::StudyProgress;

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_study(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate(args.hub, &mut config.model, &mut [], interrupt)?;
    run_stages(&args.stages, &config, &args.out, args.stages.jobs, log, interrupt, out)
}

/// Runs or lists the stages of a study, and writes its report.
pub fn run_stages(
    args: &StageArgs,
    config: &StudyConfig,
    dir: &Path,
    jobs: Option<NonZero<usize>>,
    log: LogArgs,
    interrupt: &Interrupt,
    out: &mut impl Write,
) -> Result<()> {
    let options = StudyOptions { jobs, only: args.only.clone(), keep_models: args.keep_models };
    if args.dry_run {
        return list(config, dir, &options, out);
    }
    let mut progress = StudyProgress::new(log);
    let results = run_study(config, dir, &options, interrupt, &mut |event| progress.observe(event))?;
    drop(progress);
    report::print(&cl_report::write(&results, &dir.join("report"))?, out)
}

fn list(config: &StudyConfig, dir: &Path, options: &StudyOptions, out: &mut impl Write) -> Result<()> {
    let plan = plan_study(config, dir, options)?;
    for (name, done) in &plan.stages {
        writeln!(out, "{}  {name}", if *done { "done   " } else { "to do  " })?;
    }
    let to_do = plan.stages.iter().filter(|(_, done)| !done).count();
    let model = plan.model_bytes as f64 / 1e6;
    writeln!(out, "{} stages, {to_do} of them to do: {} optimizer steps", plan.stages.len(), plan.steps)?;
    writeln!(out, "the base model takes {model:.1} MB, and as much each fully tuned one")?;
    Ok(())
}
