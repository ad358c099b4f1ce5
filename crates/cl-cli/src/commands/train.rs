use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cl_lab::{RoundInput, load_train_data, read_train, run_round};

use crate::progress::Progress;

/// Arguments of `cl train`.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration: model, data, [train.lora] or [train.full].
    config: PathBuf,
    /// Directory for log.jsonl, rows.jsonl, adapter/ and model/.
    #[arg(long)]
    out: PathBuf,
    /// Change a key of the configuration, as in --set train.learning_rate=1e-4.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with an unfinished run.
    #[arg(long)]
    resume: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let config = read_train(&args.config, &super::read(&args.config)?, &args.set)?;
    let device = cl_torch::pick_device(&config.device)?;
    let datasets = load_train_data(&config)?;
    prepare(args, &toml::to_string(&config)?)?;
    let input = RoundInput {
        model: &config.model,
        datasets: &datasets,
        mixture: config.mixture(),
        config: &config.train,
        seed: config.seed,
        profile: config.profile,
        device,
        compose: None,
    };
    let mut progress = Progress::new();
    let output = run_round(&input, &args.out, &mut |e| progress.observe(e))?;
    if let Some(report) = output.report {
        println!(
            "{} steps, mean loss of the last tenth {:.4}, {:.0} tokens/s",
            report.steps,
            report.final_loss,
            report.tokens as f64 / report.seconds.max(1e-9)
        );
    }
    if let Some(adapter) = output.adapter {
        println!("adapter  {}", adapter.display());
    }
    println!("model    {}", output.model.display());
    Ok(())
}

/// Makes the output directory with the resolved configuration, or checks that it holds this run.
fn prepare(args: &Args, resolved: &str) -> Result<()> {
    let path = args.out.join("config.toml");
    let occupied = std::fs::read_dir(&args.out).is_ok_and(|mut entries| entries.next().is_some());
    if !occupied {
        std::fs::create_dir_all(&args.out).with_context(|| format!("{}", args.out.display()))?;
        return std::fs::write(&path, resolved).with_context(|| format!("{}", path.display()));
    }
    if !args.resume {
        bail!("{} is not empty; add --resume to go on with it, or choose another --out", args.out.display());
    }
    let saved = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    if saved != resolved {
        bail!("{} holds a run with another configuration; choose another --out", args.out.display());
    }
    Ok(())
}
