use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_lab::{StudyConfig, reproduce};

use crate::progress::Progress;

/// TOML integers are signed.
const MAX_SEED: u64 = i64::MAX as u64;

/// Arguments of `cl reproduce`.
#[derive(clap::Args)]
pub struct Args {
    /// Output directory; completed stages are kept.
    #[arg(long, default_value = "target/reproduce")]
    out: PathBuf,
    /// Random seed.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    seed: u64,
}

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let config = StudyConfig { seed: args.seed, ..StudyConfig::default() };
    // So small a model gains a fifth from a second thread, and on a busy machine threads that wait for each other cost
    // minutes.
    cl_torch::tch::set_num_threads(1);
    let mut progress = Progress::new(log);
    let study = reproduce(&config, &args.out, interrupt, &mut |e| progress.observe(e))?;
    for table in &study.tables {
        writeln!(out, "{}", table.text())?;
    }
    writeln!(out, "tables   {}", args.out.join("tables.md").display())?;
    Ok(())
}
