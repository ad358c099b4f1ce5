use std::io::Write;

use anyhow::{Context, Result};
use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_cli::arguments::plan::Args;
use cl_lab::{Gpus, MemoryPlan, read_train};

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let gpus: Gpus = args.gpus.parse().map_err(anyhow::Error::msg).context("--gpus")?;
    let config = read_train(&args.config, &super::read(&args.config)?, &args.set)?;
    config.train.validate()?;
    let path = config.model.join("config.json");
    let model = serde_json::from_str(&read_text(&path, MAX_CONFIG)?).with_context(|| path.display().to_string())?;
    let plan = MemoryPlan::new(&model, &config.train, &gpus);
    let (all, trained) = plan.parameters;
    let kind = gpus.name.as_deref().unwrap_or("GPU");
    writeln!(out, "{} x {kind}, {} each; {all} parameters, {trained} trained", gpus.count, gigabytes(gpus.memory))?;
    let row = |name: &str, cells: [String; 5]| {
        let [weights, gradients, optimizer, activations, total] = cells;
        format!("{name:<10} {weights:>10} {gradients:>10} {optimizer:>10} {activations:>11} {total:>10}")
    };
    let titles = ["weights", "gradients", "optimizer", "activations", "total"];
    writeln!(out, "{}", row("zero_stage", titles.map(str::to_owned)))?;
    for stage in &plan.stages {
        let sizes = [stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total()];
        writeln!(out, "{}", row(&stage.stage.to_string(), sizes.map(gigabytes)))?;
    }
    match plan.fits(gpus.memory) {
        Some(stage) => {
            let room = gpus.memory - plan.stages[usize::from(stage)].total();
            writeln!(out, "train.zero_stage = {stage} fits, with {} to spare", gigabytes(room))?;
        }
        None => writeln!(
            out,
            "no stage fits: take more GPUs, a smaller micro_batch_size or max_length, activation_checkpointing, or [train.lora]"
        )?,
    }
    if let Some(rate) = plan.tokens_per_second {
        writeln!(out, "about {rate:.0} tokens/s, if 40 % of the nominal bf16 throughput is reached")?;
    }
    Ok(())
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}
