use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_hub::HubArgs;
use cl_lab::{method_name, read_sequence, run_sequence, tables_of};

use crate::progress::Progress;

/// Arguments of `cl sequence`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration (TOML): model, data, tasks or [[rounds]], [train.lora] or [train.full], [mixture], [replay],
    /// [eval].
    config: PathBuf,
    /// Output directory, for rounds/, matrix.json and tables.md.
    #[arg(long)]
    out: PathBuf,
    /// Override a key of the configuration, for example --set replay.fraction=0.1.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    hub: HubArgs,
    /// Resume an unfinished sequence.
    #[arg(long)]
    resume: bool,
}

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_sequence(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate_training(args.hub, &mut config.model, &mut config.train, interrupt)?;
    let mut progress = Progress::new(log);
    let report = run_sequence(&config, &args.out, args.resume, interrupt, &mut |e| progress.observe(e))?;
    for table in tables_of(&report.matrix, &method_name(&config), config.profile) {
        writeln!(out, "{}", table.text())?;
    }
    writeln!(out, "model {}", report.model.display())?;
    Ok(())
}
