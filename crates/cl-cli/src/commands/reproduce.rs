use std::path::PathBuf;

use anyhow::Result;
use cl_lab::{StudyConfig, reproduce};

use crate::progress::Progress;

/// Arguments of `cl reproduce`.
#[derive(clap::Args)]
pub struct Args {
    /// Directory for the study; stages that stand there are kept.
    #[arg(long, default_value = "target/reproduce")]
    out: PathBuf,
    /// Key of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let config = StudyConfig { seed: args.seed, ..StudyConfig::default() };
    let mut progress = Progress::new();
    let study = reproduce(&config, &args.out, &mut |e| progress.observe(e))?;
    for table in &study.tables {
        println!("{}", table.text());
    }
    println!("tables   {}", args.out.join("tables.md").display());
    Ok(())
}
