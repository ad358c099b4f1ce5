use std::io::Write;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::sequence::Args;
use cl_lab::{method_name, read_sequence, run_sequence_on, tables_of};

use crate::progress::Progress;

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_sequence(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate_training(args.hub, &mut config.model, &mut config.train, interrupt)?;
    let ranks = super::join_ranks(args.ranks.timeout(), interrupt)?;
    if !ranks.is_first() {
        return super::in_silence(|| {
            run_sequence_on(&ranks, &config, &args.out, args.resume, interrupt, &mut |_| {})?;
            Ok(())
        });
    }
    let mut progress = Progress::new(log);
    let report = run_sequence_on(&ranks, &config, &args.out, args.resume, interrupt, &mut |e| progress.observe(e))?;
    for table in tables_of(&report.matrix, &method_name(&config), config.profile) {
        writeln!(out, "{}", table.text())?;
    }
    writeln!(out, "model {}", report.model.display())?;
    Ok(())
}
