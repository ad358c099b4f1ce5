use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use cl_lab::{Finding, check_directory, check_sequence, check_train, read_sequence, read_train};

/// Arguments of `cl check`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration of `cl sequence` (it has `tasks`) or of `cl train`, or a model or adapter directory.
    path: PathBuf,
    /// Change a key of the configuration, as in --set train.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let findings = findings(args)?;
    let mut problems = 0;
    for finding in &findings {
        match finding {
            Finding::Fact(text) => println!("{text}"),
            Finding::Problem(text) => {
                problems += 1;
                println!("problem: {text}");
            }
        }
    }
    if problems > 0 {
        bail!("{}: {problems} problem{} found", args.path.display(), if problems == 1 { "" } else { "s" });
    }
    println!("{}: no problem found", args.path.display());
    Ok(())
}

fn findings(args: &Args) -> Result<Vec<Finding>> {
    if args.path.is_dir() {
        ensure!(args.set.is_empty(), "--set changes keys of a configuration; {} is a directory", args.path.display());
        return Ok(check_directory(&args.path));
    }
    let text = super::read(&args.path)?;
    // A sequence names tasks; one round names data.
    let sequence = text.lines().any(|l| l.trim_start().starts_with("tasks"));
    Ok(if sequence {
        check_sequence(&read_sequence(&args.path, &text, &args.set)?)
    } else {
        check_train(&read_train(&args.path, &text, &args.set)?)
    })
}
