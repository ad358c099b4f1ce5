use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use cl_adapters::{Linear, Mode, RouterLog};
use cl_checkpoint::Interrupt;
use cl_data::{Encoded, RowRef, pack};
use cl_model::{Decoder, LayerHooks, ModelError, PackedBatch, supervised_loss};
use cl_torch::AdamW;
use cl_torch::tch::Tensor;

use crate::adamw::Optimizer;
use crate::checkpoint::{self, State};
use crate::gradient_sums::GradientSums;
use crate::log::{LogWriter, final_loss};
use crate::plan::MicroBatch;
use crate::ranks::deal;
use crate::router::{AuxiliaryLosses, WeightedLosses};
use crate::sharding::{Sharding, SpreadWeights};
use crate::validation::{ValidationState, eval_loss, restore, snapshot};
use crate::{
    Keep, LossNorm, Plan, Ranks, RouterTraining, StepLog, TrainConfig, TrainData, TrainError, ValidationReport,
};

/// Progress after a step, which is passed to the observer of [`train`](crate::train()).
pub struct Progress<'a> {
    /// The completed step.
    pub step: &'a StepLog,
    /// Number of steps of the round.
    pub total_steps: u64,
}

/// Summary of a finished round.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainReport {
    /// Number of completed steps; fewer than planned after early stopping.
    pub steps: u64,
    /// Mean loss over the last 10% of the round's steps, including those of earlier processes; NaN if the log has none.
    pub final_loss: f64,
    /// Number of tokens that this process processed.
    pub tokens: u64,
    /// Wall-clock time in seconds of the steps that this process ran.
    pub seconds: f64,
    /// Results of the validation, if there was any.
    pub validation: Option<ValidationReport>,
}

/// Seed, output directory, stop requests and processes of a round.
pub struct TrainContext<'a> {
    /// Random seed of the dropout masks.
    pub seed: u64,
    /// Output directory.
    pub out: &'a Path,
    /// Requests the training to stop after the current step.
    pub interrupt: &'a Interrupt,
    /// The processes that train together.
    pub ranks: &'a Ranks,
    /// Do no further steps: the result has the weights of the last checkpoint.
    pub finish: bool,
    /// Called on rank 0 before a checkpoint is saved, except after the last step, with the number of completed steps
    /// and the model.
    pub at_checkpoint: Option<&'a AtCheckpoint<'a>>,
}

/// Writes what is to be kept of a checkpoint.
pub type AtCheckpoint<'a> = dyn Fn(u64, &Decoder) -> Result<(), TrainError> + 'a;

/// Fine-tunes `model` in place: its adapters, or the routers of a mixture of adapters, if it has any; otherwise all
/// weights that require a gradient.
///
/// Writes `log.jsonl` (one line per step) to `out` and, with `save_steps`, a checkpoint to `out/state/`. If there is a
/// checkpoint, training resumes from it, with the same results as an uninterrupted run. `report_to` adds other formats
/// of the log. `observe` is called after every step. If a stop is requested, training stops after the current step and
/// saves a checkpoint regardless of `save_steps`.
///
/// With several ranks, each of them must call this with the same arguments. Rank 0 writes the files, and needs those of
/// earlier processes. Afterwards, the weights are the same in all ranks, except with `zero_stage = 3`: then only rank 0
/// has all trained weights, and frozen weights remain sharded. `spread` contains the base weights that were sharded
/// while the model was loaded.
///
/// # Errors
/// Returns an error if a setting is invalid or does not match the model, if a step has no supervised token, if the
/// checkpoint is damaged or belongs to another run, if a loss, gradient or weight is not finite, or if a file cannot be
/// written. Returns [`TrainError::Interrupted`] if a stop was requested, and [`TrainError::NoCheckpoint`] with `finish` if
/// there is no checkpoint.
pub fn train(
    model: &mut Decoder,
    data: &TrainData<'_>,
    config: &TrainConfig,
    plan: &Plan,
    context: &TrainContext<'_>,
    spread: Option<SpreadWeights>,
    observe: &mut dyn FnMut(&Progress<'_>),
) -> Result<TrainReport, TrainError> {
    let TrainContext { seed, out, interrupt, ranks, finish, at_checkpoint } = *context;
    config.validate()?;
    check_model(model, config)?;
    let orthogonality = data.orthogonality.map(|o| o.hash().to_owned());
    let validation = data.validation.as_ref().map(ValidationState::new).transpose()?;
    let (data_hash, products) = (plan.check(data)?, cl_torch::products().name().to_owned());
    let fresh = State { step: 0, seed, plan: *plan, data: data_hash, products, orthogonality, validation };
    let trainable = model.trainable();
    let sharding = Sharding::new(config.zero_stage, ranks, &trainable, spread, model).map(Arc::new);
    model.activation_checkpointing = config.activation_checkpointing || sharding.is_some() && config.zero_stage == 3;
    // Gradients that are not sharded are all-reduced.
    let whole =
        if sharding.is_none() { GradientSums::new(ranks, &trainable, model.config.num_hidden_layers) } else { None };
    let sums = whole.map(Arc::new);
    let of_sums = sums.clone().map(|sums| sums as Arc<dyn LayerHooks>);
    model.layer_hooks = sharding.clone().map(|sharding| sharding as Arc<dyn LayerHooks>).or(of_sums);
    if config.sharded_checkpoints && sharding.is_some() {
        checkpoint::check_shared(out, ranks)?;
    }
    let mut optimizer = Optimizer::new(trainable, config, sharding);
    let (mut state, mut best) = checkpoint::resume(&out.join("state"), &mut optimizer, config, fresh, ranks)?;
    let mut done = state.step;
    if finish && done == 0 {
        return Err(TrainError::NoCheckpoint { path: out.to_owned() });
    }
    let (mut log, mut steps) = match ranks.is_first() {
        true => {
            std::fs::create_dir_all(out).map_err(TrainError::io(out))?;
            let (log, steps) = LogWriter::open(out, done, &config.report_to, data.validation.is_some())?;
            (Some(log), steps)
        }
        false => (None, Vec::new()),
    };
    let before = steps.len();
    let mut epochs = Epochs { data, drawn: Vec::new() };
    let routers = config.router.filter(RouterTraining::has_losses).map(|training| (training, model.record_routers()));

    let stops = |state: &State| state.validation.as_ref().is_some_and(ValidationState::stops);
    while done < plan.total_steps && !stops(&state) && !finish {
        let started = Instant::now();
        let parts = plan.micro_batches(done);
        let epoch = parts[0].epoch;
        let examples: Vec<Vec<&Encoded>> = parts.iter().map(|part| epochs.examples(plan, part)).collect();
        Plan::check_step(done, &examples)?;
        let in_mean = plan.micro_batches_in_mean(parts.len());
        let among = Among { sharding: optimizer.sharding.as_deref(), sums: sums.as_deref() };
        let factor = config.lr_scheduler_type.factor(done, config.warmup_steps, plan.total_steps);
        let learning_rate = config.learning_rate * factor;

        let Sums { loss, supervised_tokens, auxiliary } =
            accumulate(model, &examples, in_mean, config, routers.as_ref(), step_seed(seed, done), ranks, among)?;
        let number = done + 1;
        finite(number, "loss", loss)?;
        let penalty = match &optimizer.sharding {
            Some(sharding) => {
                // The penalty must be counted only once over all ranks.
                let penalty = if ranks.is_first() { penalize(model, data)? } else { None };
                data.orthogonality.map_or(Ok(()), |_| sharding.add_penalty())?;
                let mut value = [penalty.unwrap_or(0.0)];
                ranks.sum(&mut value)?;
                data.orthogonality.map(|_| value[0])
            }
            None => penalize(model, data)?,
        };
        finite(number, "penalty", penalty.unwrap_or(0.0))?;
        let grad_norm = optimizer.clip(config.max_grad_norm, ranks)?;
        finite(number, "grad_norm", grad_norm)?;
        optimizer.step(number, adamw(config, learning_rate))?;
        optimizer.zero_grad()?;
        done = number;

        let seconds = started.elapsed().as_secs_f64();
        let eval_loss = evaluate(model, data, config, plan, done, &mut state, ranks, &optimizer)?;
        if let Some((_, decided)) = &routers {
            // Router decisions on validation data must not contribute to the losses of the next step.
            drop(decided.take());
        }
        if let Some((_, true)) = eval_loss {
            optimizer.check_finite(done, ranks)?;
            best = keeps_best(data).then(|| snapshot(&optimizer.own));
        }

        let step = StepLog {
            step: done,
            epoch,
            loss,
            penalty,
            load_balancing: auxiliary.map(|a| a.load_balancing),
            z_loss: auxiliary.map(|a| a.z_loss),
            eval_loss: eval_loss.map(|(loss, _)| loss),
            grad_norm,
            learning_rate,
            tokens: examples.iter().flatten().map(|e| e.input_ids.len() as u64).sum(),
            supervised_tokens: supervised_tokens as u64,
            seconds,
        };
        log.iter_mut().try_for_each(|log| log.write(&step))?;
        tracing::debug!(step = done, loss, grad_norm, learning_rate, tokens = step.tokens, "step");
        let last = done == plan.total_steps || stops(&state);
        let stop = ranks.any(interrupt.requested())? && !last;
        let due = config.save_steps > 0 && (done % config.save_steps == 0 || last);
        if due || stop || last {
            // Saved weights must be finite; an overflow would otherwise be noticed only in the next step's loss.
            optimizer.check_finite(done, ranks)?;
        }
        if let Some(write) = at_checkpoint.filter(|_| due && !last && ranks.is_first()) {
            write(done, model)?;
        }
        if due || stop {
            state.step = done;
            checkpoint::save(&out.join("state"), &optimizer, best.as_deref(), config, &state, ranks)?;
        }
        observe(&Progress { step: &step, total_steps: plan.total_steps });
        steps.push(step);
        if stop {
            // Wait for all ranks, because a launcher terminates the others as soon as one exits.
            ranks.barrier()?;
            if !interrupt.requested() {
                // The stop was requested in another rank.
                interrupt.request();
            }
            return Err(TrainError::Interrupted { step: done, total_steps: plan.total_steps });
        }
    }
    if let Some(best) = &best {
        restore(&mut optimizer.own, best);
    }
    model.layer_hooks = None;
    if let Some(sharding) = &optimizer.sharding {
        sharding.collect()?;
    }
    let validation = state.validation.and_then(|v| v.report);
    if let Some(ValidationReport { best_step, best_loss, .. }) = &validation {
        let kept = if best.is_some() { ", whose weights are kept" } else { "" };
        tracing::info!("  lowest validation loss {best_loss:.4} after step {best_step} of {done}{kept}");
    }
    Ok(report(done, &steps, before, validation))
}

/// Whether the weights with the lowest validation loss are to be the result.
fn keeps_best(data: &TrainData<'_>) -> bool {
    data.validation.is_some_and(|v| v.config.keep == Keep::Best)
}

/// Computes the validation loss after step `done`, if it is due, and whether it is the lowest so far.
fn evaluate(
    model: &Decoder,
    data: &TrainData<'_>,
    config: &TrainConfig,
    plan: &Plan,
    done: u64,
    state: &mut State,
    ranks: &Ranks,
    optimizer: &Optimizer,
) -> Result<Option<(f64, bool)>, TrainError> {
    let (Some(validation), Some(progress)) = (data.validation, &mut state.validation) else { return Ok(None) };
    if !progress.is_due(done, plan) {
        return Ok(None);
    }
    let loss = eval_loss(model, validation.examples, config, ranks, optimizer.sharding.as_deref())?;
    finite(done, "eval_loss", loss)?;
    tracing::debug!(step = done, eval_loss = loss, "validation");
    Ok(Some((loss, progress.add(done, loss))))
}

/// Checks that the model matches `config`.
fn check_model(model: &Decoder, config: &TrainConfig) -> Result<(), TrainError> {
    let wrong = |key, value: &str, expected| Err(TrainError::Config { key, value: value.to_owned(), expected });
    let adapted = model.sites().any(|s| s.lora.is_some());
    if config.lora.is_some() && !adapted {
        return wrong("lora", "set, but the model has no adapter", "a model with adapters (`add_lora` or `load_lora`)");
    }
    if config.full.is_some() && adapted {
        return wrong("full", "set, but the model has adapters", "a model without adapters");
    }
    if config.router.is_some() {
        let (routers, trainable) = (model.routers(), model.trainable());
        if routers.is_empty() {
            return wrong("router", "set, but the model has no routers that learn", "a mixture with router weights");
        }
        if trainable.iter().map(|(name, _)| name).ne(routers.iter().map(|(name, _)| name)) {
            return wrong("router", "set, but other weights would learn too", "a model after `train_routers`");
        }
    }
    if model.trainable().is_empty() {
        return wrong("full", "set, but all weights are frozen", "trainable weights (`set_requires_grad(true)`)");
    }
    let options = config.load_options(model.device);
    if model.compute != options.compute {
        return wrong("precision", &format!("{:?}", config.precision), "the dtype that the model was loaded for");
    }
    // Routers are f32 regardless of the dtype of the other weights.
    let routers: Vec<String> = model.routers().into_iter().map(|(name, _)| name).collect();
    let other = |(name, t): &(String, Tensor)| t.kind() != options.weights && !routers.contains(name);
    if config.full.is_some() && model.trainable().iter().any(other) {
        return wrong("states", &format!("{:?}", config.states), "the dtype that the weights were loaded in");
    }
    Ok(())
}

/// Sums over the micro-batches of a step.
struct Sums {
    loss: f64,
    supervised_tokens: usize,
    auxiliary: Option<AuxiliaryLosses>,
}

/// How gradients are summed over the ranks: reduce-scattered to shards, all-reduced, or not at all in a single process.
#[derive(Clone, Copy)]
struct Among<'a> {
    sharding: Option<&'a Sharding>,
    sums: Option<&'a GradientSums>,
}

/// Runs the forward and backward passes of this rank's micro-batches, accumulating gradients. Returns sums over all
/// ranks.
fn accumulate(
    model: &Decoder,
    examples: &[Vec<&Encoded>],
    in_mean: usize,
    config: &TrainConfig,
    routers: Option<&(RouterTraining, RouterLog)>,
    seed: u64,
    ranks: &Ranks,
    among: Among<'_>,
) -> Result<Sums, TrainError> {
    let counts: Vec<usize> = examples.iter().map(|e| e.iter().map(|e| e.targets()).sum()).collect();
    let all: usize = counts.iter().sum();
    let mut loss = 0.0;
    let mut auxiliary = AuxiliaryLosses::default();
    let Among { sharding, sums } = among;
    let own = deal(counts.len(), |i| counts[i] > 0, ranks, sharding.is_some_and(Sharding::in_lockstep));
    for (place, &(i, is_own)) in own.iter().enumerate() {
        let is_last = place + 1 == own.len();
        if let (Some(sums), true) = (sums, is_last) {
            sums.begin_last_pass();
        }
        // The scale is known before the forward pass, so gradients do not have to be rescaled.
        let scale = match config.loss_norm {
            LossNorm::TokenMean => 1.0 / all as f64,
            LossNorm::MicrobatchMean => 1.0 / (counts[i] as f64 * in_mean as f64),
        };
        let scale = if is_own { scale } else { 0.0 };
        let packed = pack(&examples[i]);
        let batch = PackedBatch::from_packed(&packed, model.config.vocab_size, model.device)?;
        let mode = Mode::Train { seed: seed.wrapping_add(i as u64) };
        sharding.map_or(Ok(()), |sharding| sharding.begin_pass(is_last))?;
        let x = model.forward(&batch, mode)?;
        let supervised = supervised_loss(model, &x, &packed, scale, mode)?;
        loss += supervised.nll_sum * scale;
        let losses = routers.map(|(training, log)| WeightedLosses::of(log, *training, in_mean, &mut auxiliary));
        supervised.backward_with(&losses.as_ref().map(WeightedLosses::terms).unwrap_or_default())?;
        sharding.map_or(Ok(()), Sharding::end_pass)?;
    }
    // This must come before any other collective operation, because all ranks have to start them in the same order.
    sharding.map_or(Ok(()), Sharding::end_passes)?;
    sums.map_or(Ok(()), GradientSums::finish)?;
    let mut totals = [loss, auxiliary.load_balancing, auxiliary.z_loss];
    ranks.sum(&mut totals)?;
    let [loss, load_balancing, z_loss] = totals;
    let auxiliary = routers.map(|_| AuxiliaryLosses { load_balancing, z_loss });
    Ok(Sums { loss, supervised_tokens: all, auxiliary })
}

/// Adds the gradient of O-LoRA's penalty and returns its value.
///
/// Published implementations add the penalty to the loss of every micro-batch and divide by their number. Since it does
/// not depend on the data, this equals its gradient once per step.
fn penalize(model: &Decoder, data: &TrainData<'_>) -> Result<Option<f64>, TrainError> {
    let Some(orthogonality) = data.orthogonality else { return Ok(None) };
    let linears: Vec<&Linear> = model.linears().collect();
    Ok(Some(orthogonality.backward(&linears).map_err(ModelError::from)?))
}

/// Row orders of the epochs in use; a step may need two of them.
struct Epochs<'a> {
    data: &'a TrainData<'a>,
    drawn: Vec<(u64, Vec<RowRef>)>,
}

impl<'a> Epochs<'a> {
    /// The examples of a micro-batch.
    fn examples(&mut self, plan: &Plan, part: &MicroBatch) -> Vec<&'a Encoded> {
        if !self.drawn.iter().any(|(epoch, _)| *epoch == part.epoch) {
            // Earlier epochs are no longer needed.
            self.drawn.retain(|(epoch, _)| epoch + 1 >= part.epoch);
            self.drawn.push((part.epoch, (self.data.epoch_rows)(part.epoch)));
        }
        let (_, order) = self.drawn.iter().find(|(epoch, _)| *epoch == part.epoch).expect("drawn above");
        self.data.examples(plan.rows_of(part, order))
    }
}

fn adamw(config: &TrainConfig, lr: f64) -> AdamW {
    AdamW {
        lr,
        beta1: config.adam_beta1,
        beta2: config.adam_beta2,
        eps: config.adam_epsilon,
        weight_decay: config.weight_decay,
    }
}

/// Random seed of a step's dropout; each micro-batch adds its index.
fn step_seed(seed: u64, step: u64) -> u64 {
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(step << 20)
}

fn finite(step: u64, what: &'static str, value: f64) -> Result<(), TrainError> {
    if value.is_finite() { Ok(()) } else { Err(TrainError::NotFinite { step, what, value }) }
}

/// Creates the report. `steps` are all steps of the round, of which the first `before` ran in earlier processes.
fn report(done: u64, steps: &[StepLog], before: usize, validation: Option<ValidationReport>) -> TrainReport {
    let own = &steps[before..];
    let report = TrainReport {
        steps: done,
        final_loss: final_loss(steps),
        tokens: own.iter().map(|s| s.tokens).sum(),
        seconds: own.iter().map(|s| s.seconds).sum(),
        validation,
    };
    let (seconds, rate) = (report.seconds, report.tokens as f64 / report.seconds.max(1e-9));
    let last = steps.last().map_or(f64::NAN, |step| step.loss);
    if own.is_empty() {
        tracing::info!("  {} steps, all in earlier runs, last loss {last:.4}", report.steps);
    } else {
        tracing::info!("  {} steps, {seconds:.0} s, {rate:.0} tokens/s, last loss {last:.4}", report.steps);
    }
    report
}
