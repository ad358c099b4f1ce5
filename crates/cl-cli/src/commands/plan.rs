use std::io::Write;

use anyhow::{Context, Result, bail};
use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_cli::arguments::plan::Args;
use cl_lab::{Gpus, MemoryPlan, read_train};
use cl_model::{ExpertModule, ModelConfig};

use super::units::bytes;

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let gpus = gpus(&args.gpus)?;
    let config = read_train(&args.config, &super::read(&args.config)?, &args.set)?;
    config.train.validate()?;
    let path = config.model.join("config.json");
    let model = serde_json::from_str(&read_text(&path, MAX_CONFIG)?).with_context(|| path.display().to_string())?;
    let experts = ModelConfig::from_json(&config.model, &model)?.experts;
    if experts.is_some_and(|e| e.storage.is_delta() || e.modules != [ExpertModule::Mlp]) {
        bail!(
            "{}: the memory of a mixture is estimated only if its experts are whole MLPs, stored in full",
            path.display()
        );
    }
    let plan = MemoryPlan::new(&model, &config.train, &gpus);
    let (all, trained) = plan.parameters;
    let kind = gpus.name.as_deref().unwrap_or("GPU");
    writeln!(out, "{} x {kind}, {} each; {all} parameters, {trained} trained", gpus.count, bytes(gpus.memory))?;
    let row = |name: &str, cells: [String; 5]| {
        let [weights, gradients, optimizer, activations, total] = cells;
        format!("{name:<10} {weights:>10} {gradients:>10} {optimizer:>10} {activations:>11} {total:>10}")
    };
    let titles = ["weights", "gradients", "optimizer", "activations", "total"];
    writeln!(out, "{}", row("zero_stage", titles.map(str::to_owned)))?;
    for stage in &plan.stages {
        let sizes = [stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total()];
        writeln!(out, "{}", row(&stage.stage.to_string(), sizes.map(bytes)))?;
    }
    match plan.fits(gpus.memory) {
        Some(stage) => {
            let room = gpus.memory - plan.stages[usize::from(stage)].total();
            writeln!(out, "train.zero_stage = {stage} fits, with {} to spare", bytes(room))?;
        }
        None => writeln!(
            out,
            "no ZeRO stage fits: use more GPUs, a smaller micro_batch_size or max_length, activation_checkpointing, or [train.lora]"
        )?,
    }
    if let Some(rate) = plan.tokens_per_second {
        writeln!(out, "about {rate:.0} tokens/s, if 40 % of the nominal bf16 throughput is reached")?;
    }
    Ok(())
}

/// Parses the argument of `--gpus`.
pub(super) fn gpus(text: &str) -> Result<Gpus> {
    parse(text).map_err(anyhow::Error::msg).context("--gpus")
}

/// Parses `8xA100-80GB`, or `4x24GB` without a model name.
fn parse(text: &str) -> Result<Gpus, String> {
    let wrong = || format!("`{text}`: expected a number, a kind and its memory, such as 8xA100-80GB, or 4x24GB");
    let (count, kind) = text.split_once('x').ok_or_else(wrong)?;
    let count = count.parse().ok().filter(|n| (1..=65_536).contains(n)).ok_or_else(wrong)?;
    let (name, memory) = kind.rsplit_once('-').map_or((None, kind), |(name, memory)| (Some(name.to_owned()), memory));
    let memory = cl_merge::cli::bytes(memory).ok().filter(|&bytes| bytes >= 1_000_000).ok_or_else(wrong)?;
    Ok(Gpus { count, name, memory })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_read() {
        let found = parse("8xA100-80GB").unwrap();
        assert_eq!(found, Gpus { count: 8, name: Some("A100".to_owned()), memory: 80_000_000_000 });
        assert_eq!(parse("4x24GiB").unwrap().memory, 24 << 30);
        for wrong in ["", "A100", "0xA100-80GB", "8xA100", "8xA100-80", "8x-GB", "axA100-80GB"] {
            assert!(parse(wrong).unwrap_err().contains("such as 8xA100-80GB"), "{wrong}");
        }
    }
}
