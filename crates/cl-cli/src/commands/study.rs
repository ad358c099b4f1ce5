use std::io::Write;
use std::num::NonZero;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_hub::HubArgs;
use cl_lab::{StudyConfig, StudyOptions, plan_study, read_study, run_study};

use super::report;
use crate::progress::StudyProgress;

/// Arguments of `cl study`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration, TOML; see examples/configs/study.toml.
    config: PathBuf,
    /// Directory for the study. The stages that are done there stay; the same command goes on after a stop.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Override a key of the configuration, for example --set lora.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    hub: HubArgs,
    #[command(flatten)]
    stages: StageArgs,
}

/// Which stages are run, and how.
#[derive(clap::Args)]
pub struct StageArgs {
    /// Stages that run at once, each with the memory of a training; one when absent, `cl reproduce` one for each core.
    #[arg(long, value_name = "N")]
    pub jobs: Option<NonZero<usize>>,
    /// Only the stages whose name starts with this, and what they need; may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// List the stages, the steps and the space they take; write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Keep the models of finished stages; otherwise adapters and scores are kept.
    #[arg(long)]
    keep_models: bool,
}

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_study(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate(args.hub, &mut config.model, &mut [], interrupt)?;
    args.stages.run(&config, &args.out, args.stages.jobs, log, interrupt, out)
}

impl StageArgs {
    /// Runs or lists the stages of a study, and writes its report.
    pub fn run(
        &self,
        config: &StudyConfig,
        dir: &Path,
        jobs: Option<NonZero<usize>>,
        log: LogArgs,
        interrupt: &Interrupt,
        out: &mut impl Write,
    ) -> Result<()> {
        let options = StudyOptions { jobs, only: self.only.clone(), keep_models: self.keep_models };
        if self.dry_run {
            return list(config, dir, &options, out);
        }
        let mut progress = StudyProgress::new(log);
        let results = run_study(config, dir, &options, interrupt, &mut |event| progress.observe(event))?;
        drop(progress);
        report::print(&cl_report::write(&results, &dir.join("report"))?, out)
    }
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
