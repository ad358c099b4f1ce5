use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use cl_data::RowPlan;

/// What can be asked about data.
#[derive(clap::Subcommand)]
pub enum Command {
    /// List the rows that a run or a round of a sequence went through, in their order, as JSON lines.
    Rows(RowsArgs),
}

/// Arguments of `cl data rows`.
#[derive(clap::Args)]
pub struct RowsArgs {
    /// Directory of a run, or of a round (rounds/1-TASK); or its rows.json.
    run: PathBuf,
    /// Only this epoch, from 0.
    #[arg(long)]
    epoch: Option<u64>,
}

/// Runs the command.
pub fn run(command: &Command, out: &mut impl Write) -> Result<()> {
    let Command::Rows(args) = command;
    let file = if args.run.is_dir() { args.run.join("rows.json") } else { args.run.clone() };
    let plan = RowPlan::read(&file)?;
    let epochs = plan.epochs();
    let chosen = match args.epoch {
        Some(epoch) => {
            ensure!(epoch < epochs, "--epoch {epoch}: the round goes through {epochs}, counted from 0");
            epoch..epoch + 1
        }
        None => 0..epochs,
    };
    // One epoch in memory at a time.
    let mut lines = std::io::BufWriter::new(out);
    for row in chosen.flat_map(|epoch| plan.used(epoch)) {
        serde_json::to_writer(&mut lines, &row)?;
        lines.write_all(b"\n")?;
    }
    Ok(lines.flush()?)
}
