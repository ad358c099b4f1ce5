use std::io::Write;

use anyhow::{Result, ensure};
use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::moe::{PoolingArg, StatesArgs, TrainRouterArgs};
use cl_lab::{Pooling, read_router, router_states, run_train_router};
use cl_moe::MixConfig;
use cl_train::{final_loss, read_log};

use crate::progress::Progress;

/// Computes the hidden states of prompts.
pub fn states(args: &StatesArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let file = args.out.display();
    ensure!(args.overwrite || !args.out.exists(), "{file}: exists already; add --overwrite, or choose another --out");
    ensure!(!args.out.is_dir(), "{file}: is a directory; --out must be a file");
    let mut config = MixConfig::read(&args.config)?;
    cl_moe::cli::find_models(&mut config, &args.hub.names(interrupt))?;
    let pooling = match args.pooling {
        PoolingArg::Last => Pooling::Last,
        PoolingArg::Mean => Pooling::Mean,
        PoolingArg::Embeddings => Pooling::Embeddings,
    };
    let device = cl_torch::pick_device(&args.device)?;
    let states = router_states(&config, pooling, args.precision, device)?;
    write_file(&args.out, &states)?;
    writeln!(out, "{file}: hidden states of the prompts of {} experts", config.experts.len())?;
    Ok(())
}

/// Trains routers.
pub fn train_router(args: &TrainRouterArgs, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_router(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate(args.hub, &mut config.model, &mut [], interrupt)?;
    let mut progress = Progress::new(log);
    let output = run_train_router(&config, &args.out, args.resume, interrupt, &mut |e| progress.observe(e))?;
    let steps = read_log(&args.out.join("log.jsonl"))?;
    let (first, last) = (steps.first().map_or(f64::NAN, |s| s.loss), final_loss(&steps));
    writeln!(out, "{} steps, initial loss {first:.4}, mean over the last 10% of steps {last:.4}", steps.len())?;
    for task in output.routing.iter().flat_map(|r| &r.tasks) {
        let experts = output.routing.iter().flat_map(|r| &r.experts).zip(&task.routing.gate_share);
        let shares: Vec<String> = experts.map(|(name, share)| format!("{name} {share:.2}")).collect();
        writeln!(out, "{}: gates {}", task.task, shares.join(", "))?;
    }
    writeln!(out, "mixture  {}", output.mixture.display())?;
    Ok(())
}
