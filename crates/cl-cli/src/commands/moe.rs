use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::moe::{PoolingArg, RouteArgs, StatesArgs, TrainRouterArgs};
use cl_lab::{LoadedModel, read_router, route_task, router_states, run_train_router};
use cl_merge::adapter::{CombineOptions, combine};
use cl_moe::{BlendConfig, MixConfig, Pooling};
use cl_train::{final_loss, read_log};

use super::prompts::prompts;
use crate::progress::Progress;

/// Runs `cl moe states`.
pub fn states(args: &StatesArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let file = args.out.display();
    ensure!(args.overwrite || !args.out.exists(), "{file}: already exists; add --overwrite, or choose another --out");
    ensure!(!args.out.is_dir(), "{file}: is a directory; --out must be a file");
    let mut config = MixConfig::read(&args.config)?;
    cl_moe::cli::find_models(&mut config, &args.compute.hub.names(interrupt))?;
    if let Some(pooling) = args.pooling {
        config.router.pooling = Some(match pooling {
            PoolingArg::Last => Pooling::Last,
            PoolingArg::Mean => Pooling::Mean,
            PoolingArg::Embeddings => Pooling::Embeddings,
        });
    }
    let states = router_states(&config, args.compute.precision, cl_torch::pick_device(&args.compute.device)?)?;
    write_file(&args.out, &states)?;
    writeln!(out, "{file}: hidden states of the prompts of {} experts", config.experts.len())?;
    Ok(())
}

/// Runs `cl moe route`.
pub fn route(args: &RouteArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let temperature = args.temperature;
    ensure!(temperature.is_finite() && temperature > 0.0, "--temperature {temperature}: expected a positive number");
    let mut config = BlendConfig::read(&args.config)?;
    cl_moe::cli::find_adapters(&mut config, &args.compute.hub.names(interrupt))?;
    if let Some(dir) = &args.out {
        let models = config.experts.iter().filter(|expert| expert.adapter.is_none()).count();
        ensure!(
            models == 0,
            "--out: {models} experts are models; extract adapters from them with `cl adapter extract`"
        );
        config.check_output(dir, args.overwrite)?;
    }
    let task = prompts(&args.prompts, &config.base_model)?;
    let base = LoadedModel::open(
        &config.base_model,
        None,
        args.compute.precision,
        None,
        cl_torch::pick_device(&args.compute.device)?,
    )?;
    let positions = base.model.config.max_position_embeddings;
    let tokens = task.iter().take(args.limit.get()).map(|prompt| prompt.tokens(&base.tokenizer, 0, positions));
    let task = tokens.collect::<Result<Vec<Vec<u32>>>>()?;
    let shares = route_task(&base, &config, &task, args.top.get(), args.temperature)?;
    let width = shares.iter().map(|share| share.name.chars().count()).max().unwrap_or(0).max("adapter".len());
    writeln!(out, "{:width$}  similarity  weight", "adapter")?;
    for share in &shares {
        writeln!(out, "{:width$}  {:>10.3}  {:>6.3}", share.name, share.similarity, share.gate)?;
    }
    let Some(dir) = &args.out else { return Ok(()) };
    let selected = config.experts.iter().zip(&shares).filter(|(_, share)| share.gate > 0.0);
    let (adapters, weights): (Vec<PathBuf>, Vec<f64>) =
        selected.map(|(expert, share)| (expert.source().to_owned(), share.gate)).unzip();
    let options = CombineOptions {
        method: "linear".to_owned(),
        weights,
        base: Some(config.base_model.clone()),
        overwrite: args.overwrite,
        interrupt: interrupt.clone(),
        ..CombineOptions::default()
    };
    combine(&adapters, dir, &options)?;
    writeln!(out, "adapter  {}", dir.display())?;
    Ok(())
}

/// Runs `cl moe train-router`.
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
