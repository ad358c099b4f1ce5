use std::io::Write;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::train::Args;
use cl_lab::{LabError, Observer, RoundOutput, finish_train_on, read_train, run_train_on};
use cl_train::{Ranks, final_loss, read_log};

use crate::progress::Progress;

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_train(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate_training(args.hub, &mut config.model, &mut config.train, interrupt)?;
    let train = |ranks: &Ranks, observer: &mut Observer<'_>| -> Result<RoundOutput, LabError> {
        if args.finish {
            finish_train_on(ranks, &config, &args.out, interrupt, observer)
        } else {
            run_train_on(ranks, &config, &args.out, args.resume, interrupt, observer)
        }
    };
    let ranks = super::join_ranks(args.ranks.timeout(), interrupt)?;
    if !ranks.is_first() {
        return super::in_silence(|| {
            train(&ranks, &mut |_| {})?;
            Ok(())
        });
    }
    let mut progress = Progress::new(log);
    let output = train(&ranks, &mut |e| progress.observe(e))?;
    // Computed from the log, which includes the steps of interrupted runs.
    let steps = read_log(&args.out.join("log.jsonl"))?;
    let loss = final_loss(&steps);
    let tokens: u64 = steps.iter().map(|s| s.tokens).sum();
    let rate = tokens as f64 / steps.iter().map(|s| s.seconds).sum::<f64>().max(1e-9);
    writeln!(out, "{} steps, mean loss over the last 10% of steps {loss:.4}, {rate:.0} tokens/s", steps.len())?;
    let evaluated = steps.iter().filter_map(|s| Some((s.step, s.eval_loss?)));
    if let Some((step, loss)) = evaluated.min_by(|a, b| a.1.total_cmp(&b.1)) {
        writeln!(out, "lowest validation loss {loss:.4} after step {step}")?;
    }
    if let Some(adapter) = output.adapter {
        writeln!(out, "adapter  {}", adapter.display())?;
    }
    writeln!(out, "model    {}", output.model.display())?;
    Ok(())
}
