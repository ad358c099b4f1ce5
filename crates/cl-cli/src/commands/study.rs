use std::io::Write;
use std::num::NonZero;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::study::{Args, StageArgs};
use cl_cli::light::report;
use cl_lab::{
    LabError, PlannedStage, StudyConfig, StudyOptions, StudyPlan, ZeroStage, plan_study, read_study, run_study,
};
use cl_report::{StudyResults, Written};

use super::units::{bytes, count, time};
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
    let options = options(args, jobs)?;
    if args.dry_run {
        return print_plan(&plan_study(config, dir, &options)?, out);
    }
    let mut progress = StudyProgress::new(log);
    let outcome = run_study(config, dir, &options, interrupt, &mut |event| progress.observe(event));
    drop(progress);
    let (results, failed) = match outcome {
        Ok(results) => (results, None),
        // The report covers the stages that succeeded.
        Err(error @ LabError::Stages(_)) => (StudyResults::read_file(&dir.join("results.json"))?, Some(error)),
        Err(error) => return Err(error.into()),
    };
    report::print(&write_report(&results, &dir.join("report"))?, out)?;
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// Converts the arguments to the options of a study.
pub fn options(args: &StageArgs, jobs: Option<NonZero<usize>>) -> Result<StudyOptions> {
    let gpus = args.gpus.as_deref().map(super::plan::gpus).transpose()?;
    Ok(StudyOptions { jobs, only: args.only.clone(), keep_models: args.keep_models, gpus })
}

/// Prints a line for each stage, then the totals.
pub fn print_plan(plan: &StudyPlan, out: &mut impl Write) -> Result<()> {
    let width = plan.stages.iter().map(|stage| stage.name.chars().count()).max().unwrap_or(0).max(5);
    let divided = plan.stages.iter().any(|stage| stage.zero_stage.is_some());
    let head = ["steps", "trained", "scored", "time", "disk", "memory", "zero_stage"];
    let line = |name: &str, state: &str, cells: [String; 7]| {
        let cells: String = cells[..if divided { 7 } else { 6 }].iter().map(|cell| format!("{cell:>12}")).collect();
        format!("{state:<5}  {name:<width$}{cells}")
    };
    writeln!(out, "{}", line("stage", "", head.map(str::to_owned)))?;
    for stage in &plan.stages {
        let cells = [
            stage.steps.to_string(),
            count(stage.train_tokens),
            count(stage.scored_tokens),
            time(stage.seconds),
            bytes(stage.bytes),
            bytes(stage.memory),
            match stage.zero_stage {
                Some(ZeroStage::Fits(lowest)) => lowest.to_string(),
                Some(ZeroStage::None) => "none fits".to_owned(),
                None => "-".to_owned(),
            },
        ];
        writeln!(out, "{}", line(&stage.name, if stage.done { "done" } else { "to do" }, cells))?;
    }
    let left: Vec<&PlannedStage> = plan.stages.iter().filter(|stage| !stage.done).collect();
    if left.is_empty() {
        writeln!(out, "{} stages, all completed", plan.stages.len())?;
        return Ok(());
    }
    let sum = |of: fn(&PlannedStage) -> u64| left.iter().map(|stage| of(stage)).sum::<u64>();
    let seconds: f64 = left.iter().map(|stage| stage.seconds).sum();
    let memory = left.iter().map(|stage| stage.memory).max().unwrap_or(0);
    writeln!(
        out,
        "{} stages, {} of them to do: {} steps, {} tokens trained and {} scored, about {}",
        plan.stages.len(),
        left.len(),
        sum(|stage| stage.steps),
        count(sum(|stage| stage.train_tokens)),
        count(sum(|stage| stage.scored_tokens)),
        time(seconds)
    )?;
    writeln!(
        out,
        "disk: about {} at the peak, {} at the end; memory: about {} per {}",
        bytes(plan.peak_bytes),
        bytes(plan.kept_bytes),
        bytes(memory),
        if divided { "GPU" } else { "job" }
    )?;
    let too_large = left.iter().filter(|stage| stage.zero_stage == Some(ZeroStage::None)).count();
    if too_large > 0 {
        writeln!(out, "warning: {too_large} of the stages do not fit into the memory of these GPUs")?;
    }
    for rate in &plan.rates {
        writeln!(out, "time: {rate}")?;
    }
    for warning in &plan.warnings {
        writeln!(out, "{warning}")?;
    }
    Ok(())
}

/// Writes the report; if another process of the same study is just writing it, waits for that process.
fn write_report(results: &StudyResults, out: &Path) -> Result<Written> {
    const TRIES: usize = 600;
    for _ in 0..TRIES {
        match cl_report::write(results, out) {
            Err(cl_report::Error::Checkpoint(cl_checkpoint::Error::Busy { .. })) => {
                std::thread::sleep(Duration::from_millis(100));
            }
            written => return Ok(written?),
        }
    }
    Ok(cl_report::write(results, out)?)
}
