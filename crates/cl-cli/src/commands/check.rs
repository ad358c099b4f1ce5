use std::path::PathBuf;

use anyhow::{Result, bail};
use cl_lab::{Finding, check_sequence, check_train, read_sequence, read_train};

/// Arguments of `cl check`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration of `cl sequence` (it has `tasks`) or of `cl train`.
    config: PathBuf,
    /// Change a key of the configuration.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let text = super::read(&args.config)?;
    // A sequence names tasks; one round names data.
    let sequence = text.lines().any(|l| l.trim_start().starts_with("tasks"));
    let findings = if sequence {
        check_sequence(&read_sequence(&args.config, &text, &args.set)?)
    } else {
        check_train(&read_train(&args.config, &text, &args.set)?)
    };
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
        bail!("{}: {problems} problem{} found", args.config.display(), if problems == 1 { "" } else { "s" });
    }
    println!("{}: no problem found", args.config.display());
    Ok(())
}
