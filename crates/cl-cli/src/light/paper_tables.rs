//! `cl paper-tables`.

use std::io::Write;

use anyhow::Result;
use cl_eval::Table;
use cl_eval::paper::{Verdict, check};

/// Arguments of `cl paper-tables`.
#[derive(clap::Args)]
pub struct Args {
    /// Show only cells that differ from the printed value.
    #[arg(long)]
    flagged: bool,
}

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let cells = check();
    let rows = cells
        .iter()
        .filter(|c| !args.flagged || c.verdict != Verdict::Agrees)
        .map(|c| {
            let verdict = match c.verdict {
                Verdict::Agrees => "",
                Verdict::Swapped => "is printed in the adjacent column",
                Verdict::Differs => "differs",
            };
            vec![
                format!("Table {}", c.table),
                c.row.clone(),
                c.column.clone(),
                format!("{:.4}", c.printed),
                format!("{:.4}", c.recomputed),
                verdict.to_owned(),
            ]
        })
        .collect();
    let columns = ["table", "row", "column", "printed", "recomputed", ""].map(str::to_owned).to_vec();
    let flagged = cells.iter().filter(|c| c.verdict != Verdict::Agrees).count();
    let caption = format!("{} cells recomputed; {flagged} differ from the printed value.", cells.len());
    write!(out, "{}", Table { caption, columns, rows }.text())?;
    Ok(())
}
