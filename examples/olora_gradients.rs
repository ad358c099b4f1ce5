//! Gradients of o-lora's penalties for a new adapter, compared with those of the loss, on a real model and real data.
//!
//! ```text
//! cargo run -p cl-examples --example olora_gradients -- MODEL TRAIN.json [TRAIN.json ...]
//! ```
//!
//! One short round on each file except the last trains the earlier adapters. On the last file, the gradients of loss
//! and penalties are computed at the start of its round and after some steps. Rank 8 on every linear layer. The output
//! has norms over all A, for λ = 1, and the λ at which the gradients of penalty and loss have equal norms.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cl_adapters::{Lambda, Linear, LoraConfig, Mode, OloraConfig, Orthogonality, Overlap, save_lora};
use cl_checkpoint::{Adapter, Checkpoint, Interrupt, Manifest};
use cl_data::{Encoded, Encoding, Format, Profile, RowRef, Tokenizer, load, pack};
use cl_model::{Decoder, LoadOptions, PackedBatch, supervised_loss};
use cl_torch::tch::Kind;
use cl_train::{Plan, Ranks, TrainConfig, TrainContext, TrainData, train};

const STEPS: u64 = 12;

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, files @ ..] = arguments.as_slice() else { anyhow::bail!("expected MODEL TRAIN.json ...") };
    ensure!(files.len() >= 2, "at least two files: the last one's round has all others before it");
    let folder = tempfile::tempdir()?;
    let checkpoint = Checkpoint::open(model)?;
    let tokenizer = Tokenizer::from_dir(model)?;
    let rows = |file: &Path| -> Result<Vec<Encoded>> {
        let dataset = load(file, Format::Auto)?;
        let some = &dataset.examples[..dataset.examples.len().min(64)];
        let (max_length, profile) = (Some(256), Profile::Method);
        Ok(Encoding { tokenizer: &tokenizer, chat: None, max_length, profile }.examples(some)?)
    };
    let mut decoder = Decoder::load(&checkpoint, LoadOptions::cpu(Kind::Float))?;
    let (last, before) = files.split_last().context("checked above")?;
    let mut earlier = Vec::new();
    for (round, file) in (1..).zip(before) {
        let dir = folder.path().join(format!("adapter-{round}"));
        few_steps(&mut decoder, rows(file)?, round, 0, folder.path())?;
        let lora = LoraConfig::default();
        save_lora(&dir, decoder.sites(), &[], &lora, "base", Manifest::new("adapter"), false)?;
        earlier.push(dir);
    }
    println!(
        "{:<8} {:>8} {:>6} {:>11} {:>11} {:>9} {:>13}",
        "mode", "earlier", "steps", "omega", "|d omega|", "|d loss|", "equal lambda"
    );
    for steps in [0, STEPS] {
        let rows = rows(last)?;
        few_steps(&mut decoder, rows.clone(), 99, STEPS - steps, folder.path())?;
        let loss = gradient_of_loss(&decoder, &rows[..16.min(rows.len())])?;
        for count in if earlier.len() > 1 { vec![1, earlier.len()] } else { vec![1] } {
            let adapters = earlier[..count].iter().map(|dir| Ok(Adapter::open(dir)?)).collect::<Result<Vec<_>>>()?;
            for (name, mode) in [("l1", Overlap::L1), ("squared", Overlap::Squared), ("cosine", Overlap::Cosine)] {
                let (omega, pull) = gradient_of_term(&decoder, &adapters, mode)?;
                println!(
                    "{name:<8} {count:>8} {steps:>6} {omega:>11.4e} {pull:>11.4e} {loss:>9.4} {:>13.4e}",
                    loss / pull
                );
            }
        }
    }
    Ok(())
}

/// A fresh adapter after all steps of a short round but `less`.
fn few_steps(model: &mut Decoder, rows: Vec<Encoded>, seed: u64, less: u64, folder: &Path) -> Result<()> {
    let lora = LoraConfig::default();
    model.add_lora(&lora, seed)?;
    if less == STEPS {
        return Ok(());
    }
    let config = TrainConfig { max_steps: Some(STEPS - less), lora: Some(lora), ..TrainConfig::default() };
    let order = |epoch: u64| -> Vec<RowRef> {
        cl_data::shuffled(rows.len(), epoch, seed).into_iter().map(|row| RowRef { dataset: 0, row }).collect()
    };
    let plan = Plan::new(rows.len(), &config, false)?;
    let data =
        TrainData { datasets: std::slice::from_ref(&rows), epoch_rows: &order, orthogonality: None, validation: None };
    let out = folder.join(format!("log-{seed}-{less}"));
    let context = TrainContext {
        finish: false,
        at_checkpoint: None,
        seed,
        out: &out,
        interrupt: &Interrupt::default(),
        ranks: &Ranks::alone(),
    };
    let report = train(model, &data, &config, &plan, &context, None, &mut |_| {})?;
    eprintln!("{} steps, loss {:.3}", report.steps, report.final_loss);
    Ok(())
}

/// Norm over all A, whose gradients are then forgotten.
fn taken(model: &Decoder) -> f64 {
    let mut sum = 0.0;
    for lora in model.linears().filter_map(|layer| layer.lora.as_ref()) {
        for (counts, factor) in [(true, &lora.a), (false, &lora.b)] {
            let mut factor = factor.shallow_clone();
            let grad = factor.grad();
            if counts && grad.defined() {
                sum += grad.square().sum(Kind::Double).double_value(&[]);
            }
            factor.zero_grad();
        }
    }
    f64::sqrt(sum)
}

/// Of the mean over supervised tokens.
fn gradient_of_loss(model: &Decoder, rows: &[Encoded]) -> Result<f64> {
    let packed = pack(&rows.iter().collect::<Vec<_>>());
    let batch = PackedBatch::from_packed(&packed, model.config.vocab_size, model.device)?;
    let mode = Mode::Train { seed: 1 };
    let x = model.forward(&batch, mode)?;
    let tokens = packed.labels.iter().filter(|label| **label != -100).count();
    supervised_loss(model, &x, &packed, 1.0 / tokens as f64, mode)?.backward()?;
    Ok(taken(model))
}

/// A term at λ = 1 and the norm of its gradient.
fn gradient_of_term(model: &Decoder, earlier: &[Adapter], mode: Overlap) -> Result<(f64, f64)> {
    let linears: Vec<&Linear> = model.linears().collect();
    let config = OloraConfig { mode, lambda: Lambda::Every(1.0), ..OloraConfig::default() };
    let term = Orthogonality::new(linears.iter().copied(), earlier, &config)?;
    let omega = term.backward(&linears)?;
    Ok((omega, taken(model)))
}
