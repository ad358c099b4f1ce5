use std::io::Write;

use anyhow::{Result, bail, ensure};
use cl_checkpoint::Interrupt;
use cl_cli::arguments::check::Args;
use cl_lab::{
    Finding, check_directory, check_router, check_sequence, check_train, read_router, read_sequence, read_train,
};

/// Runs the command.
pub fn run(args: &Args, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let findings = findings(args, interrupt)?;
    let mut problems = 0;
    for finding in &findings {
        match finding {
            Finding::Fact(text) => writeln!(out, "{text}")?,
            Finding::Problem(problem) => {
                problems += 1;
                writeln!(out, "problem: {problem}")?;
            }
        }
    }
    if problems > 0 {
        bail!("{}: {problems} problem{} found", args.path.display(), if problems == 1 { "" } else { "s" });
    }
    writeln!(out, "{}: no problems found", args.path.display())?;
    Ok(())
}

fn findings(args: &Args, interrupt: &Interrupt) -> Result<Vec<Finding>> {
    if args.path.is_dir() {
        ensure!(args.set.is_empty(), "--set applies to configurations; {} is a directory", args.path.display());
        return Ok(check_directory(&args.path));
    }
    let text = super::read(&args.path)?;
    Ok(if is_router(&text, &args.set) {
        let mut config = read_router(&args.path, &text, &args.set)?;
        super::locate(args.hub, &mut config.model, &mut [], interrupt)?;
        check_router(&config)
    } else if is_sequence(&text, &args.set) {
        let mut config = read_sequence(&args.path, &text, &args.set)?;
        super::locate_training(args.hub, &mut config.model, &mut config.train, interrupt)?;
        check_sequence(&config)
    } else {
        let mut config = read_train(&args.path, &text, &args.set)?;
        super::locate_training(args.hub, &mut config.model, &mut config.train, interrupt)?;
        check_train(&config)
    })
}

/// Whether a configuration is for router training: it has the table `[router]`, or names a mixture of adapters. A study
/// can have `[router]`, too, but also has tasks or rounds.
fn is_router(text: &str, set: &[String]) -> bool {
    let table: toml::Table = toml::from_str(text).unwrap_or_default();
    let set = |key: &str| set.iter().any(|entry| entry.trim_start().starts_with(key));
    let several = table.contains_key("tasks") || table.contains_key("rounds");
    !several && (table.contains_key("router") || table.contains_key("adapter") || set("router.") || set("adapter="))
}

/// Whether a configuration is for a sequence: it has `tasks` or `[[rounds]]`, and its `data` is a path. A single round
/// has a table `[data]`.
fn is_sequence(text: &str, set: &[String]) -> bool {
    let table: toml::Table = toml::from_str(text).unwrap_or_default();
    table.contains_key("tasks")
        || table.contains_key("rounds")
        || table.get("data").is_some_and(toml::Value::is_str)
        || set.iter().any(|entry| entry.trim_start().starts_with("tasks") || entry.trim_start().starts_with("rounds"))
}
