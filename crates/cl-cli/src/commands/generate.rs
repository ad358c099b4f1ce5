use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use cl_lab::LoadedModel;
use cl_model::{Scorer, greedy};

use super::Precision;

/// Arguments of `cl generate`.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory.
    model: PathBuf,
    /// Text to continue; may be given several times, the answers come in the same order.
    #[arg(long, required = true, allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// PEFT adapter directory to put beside the model.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Most tokens to write.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Dtype to compute in.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print the ids of the new tokens instead of their text.
    #[arg(long)]
    ids: bool,
}

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let device = cl_torch::pick_device(&args.device)?;
    let loaded = LoadedModel::open(&args.model, args.adapter.as_deref(), args.precision.into(), device)?;
    let prompts = args.prompt.iter().map(|p| loaded.tokenizer.encode(p, true)).collect::<Result<Vec<Vec<u32>>, _>>()?;
    let most = loaded.model.config.max_position_embeddings;
    for (text, ids) in args.prompt.iter().zip(&prompts) {
        let length = ids.len().saturating_add(args.max_new_tokens);
        ensure!(!ids.is_empty(), "--prompt {text:?} has no tokens; this tokenizer adds no BOS by itself");
        ensure!(
            length <= most,
            "--prompt of {} tokens and --max-new-tokens {} exceed the model's {most} positions",
            ids.len(),
            args.max_new_tokens
        );
    }
    let end = Scorer::new(&loaded.model, &loaded.tokenizer).end_tokens();
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let generations = greedy(&loaded.model, &slices, args.max_new_tokens, &end, &mut |_, _| false)?;
    for generation in generations {
        if args.ids {
            writeln!(out, "{:?}", generation.ids)?;
        } else {
            writeln!(out, "{}", loaded.tokenizer.decode(&generation.ids, true)?)?;
        }
    }
    Ok(())
}
