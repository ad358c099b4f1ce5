use cl_torch::tch::{self, Device, Kind, Tensor};

use crate::kv_cache::Prefix;
use crate::prefix_tree::{Limits, PrefixTree, batches};
use crate::{Decoder, ModelError};

/// Natural log-probability of a token, and whether it was the most likely one.
type Scored = (f64, bool);

/// Returns the natural log-probability of every token of a sequence given the preceding tokens, starting with the
/// second token, and whether it was the most likely one.
///
/// # Errors
/// [`ModelError::EmptySequence`], [`ModelError::TokenId`], [`ModelError::NotANumber`], [`ModelError::Torch`].
pub fn token_log_probs(model: &Decoder, sequences: &[&[u32]]) -> Result<Vec<Vec<(f64, bool)>>, ModelError> {
    if let Some(index) = sequences.iter().position(|s| s.is_empty()) {
        return Err(ModelError::EmptySequence { index });
    }
    let mut all = vec![Vec::new(); sequences.len()];
    let from = vec![1; sequences.len()];
    log_probs_from(model, sequences, &from, usize::MAX, &mut |i, scored| {
        all[i] = scored;
        Ok::<(), ModelError>(())
    })?;
    Ok(all)
}

/// Number of rows of logits that are in memory at the same time.
const CHUNK: usize = 256;

/// Computes what [`token_log_probs`] does, but only for the tokens of every sequence from position `from[i]` on (at least
/// from the second), in batches of at most `rows` rows. The results of each sequence are passed to the callback, with
/// its index, as soon as they are known.
///
/// Shared prefixes are computed once, the last token of each sequence is not computed at all, and the output head is
/// applied only to rows whose next token is scored: choices of a single token are read from one row.
///
/// # Errors
/// [`ModelError::TokenId`], [`ModelError::NotANumber`], [`ModelError::Torch`], and the callback's errors.
pub fn log_probs_from<E: From<ModelError>>(
    model: &Decoder,
    sequences: &[&[u32]],
    from: &[usize],
    rows: usize,
    scored: &mut dyn FnMut(usize, Vec<(f64, bool)>) -> Result<(), E>,
) -> Result<(), E> {
    let _no_graph = tch::no_grad_guard();
    let (open, nothing): (Vec<usize>, Vec<usize>) = (0..sequences.len()).partition(|&i| sequences[i].len() > from[i]);
    for i in nothing {
        scored(i, Vec::new())?;
    }
    let fed: Vec<&[u32]> = open.iter().map(|&i| &sequences[i][..sequences[i].len() - 1]).collect();
    let wanted: Vec<usize> = open.iter().map(|&i| from[i].max(1) - 1).collect();
    let share = model.may_share(fed.iter().map(|s| s.len()).max().unwrap_or(0));
    let limits = Limits { rows, count: usize::MAX, places: usize::MAX };
    let plan = batches(&fed, &wanted, limits, share);
    let mut past = Prefix::default();
    for (batch, next) in plan.iter().zip(plan.iter().skip(1).map(|b| b.past).chain([0])) {
        let own: Vec<&[u32]> = batch.sequences.iter().map(|&s| fed[s]).collect();
        let tree = PrefixTree::new(&own, batch.past, share);
        let last = tree.rows(own.len() - 1);
        let kept_rows = Tensor::from_slice(&last[..next.saturating_sub(batch.past)]).to_device(model.device);
        let mut kept = Prefix::of_len(next);
        let mut questions = Questions::default();
        for (place, &s) in batch.sequences.iter().enumerate() {
            let path = tree.rows(place);
            for t in wanted[s]..fed[s].len() {
                questions.ask(path[t - batch.past], sequences[open[s]][t + 1]);
            }
        }
        let wanted_rows = questions.rows();
        let x = model.forward_tree(&tree, &past, &wanted_rows, &mut |layer, k, v| {
            kept.store(past.layer(layer), &kept_rows, k, v);
        })?;
        past = kept;
        let mut answers = questions.answer(model, &x)?.into_iter();
        for &s in &batch.sequences {
            scored(open[s], answers.by_ref().take(fed[s].len() - wanted[s]).collect())?;
        }
    }
    Ok(())
}

/// Tokens whose probability after a given row is wanted; there can be several for one row.
#[derive(Default)]
struct Questions {
    asked: Vec<(i64, i64)>, // row and token
}

impl Questions {
    fn ask(&mut self, row: i64, token: u32) {
        self.asked.push((row, i64::from(token)));
    }

    /// The distinct rows, in ascending order.
    fn rows(&self) -> Vec<i64> {
        let mut rows: Vec<i64> = self.asked.iter().map(|&(row, _)| row).collect();
        rows.sort_unstable();
        rows.dedup();
        rows
    }

    /// Computes the answers in the order of the questions, from the residual stream of [`Questions::rows`].
    fn answer(&self, model: &Decoder, x: &Tensor) -> Result<Vec<Scored>, ModelError> {
        let vocab_size = model.config.vocab_size;
        if let Some(&(_, id)) = self.asked.iter().find(|(_, id)| *id >= vocab_size) {
            return Err(ModelError::TokenId { id, vocab_size });
        }
        let mut order: Vec<usize> = (0..self.asked.len()).collect();
        order.sort_by_key(|&i| self.asked[i]);
        let mut answers = vec![(0.0, false); self.asked.len()];
        let mut open = order.as_slice();
        for (chunk, rows) in self.rows().chunks(CHUNK).enumerate() {
            let asked = open.partition_point(|&i| self.asked[i].0 <= rows[rows.len() - 1]);
            let (of_chunk, later) = open.split_at(asked);
            // Index in the flattened (rows · vocab) logits.
            let place = |&i: &usize| {
                let (row, token) = self.asked[i];
                rows.partition_point(|&r| r < row) as i64 * vocab_size + token
            };
            let places: Vec<i64> = of_chunk.iter().map(place).collect();
            let x = x.narrow(0, (chunk * CHUNK) as i64, rows.len() as i64);
            let scored = log_probs(model, &x, &places);
            if scored.iter().any(|(value, _)| value.is_nan()) {
                return Err(ModelError::NotANumber);
            }
            of_chunk.iter().zip(scored).for_each(|(&i, answer)| answers[i] = answer);
            open = later;
        }
        Ok(answers)
    }
}

/// Scores of the logits at `places` in the flattened `(rows, vocab)` logits of `x` `(rows, hidden)`.
fn log_probs(model: &Decoder, x: &Tensor, places: &[i64]) -> Vec<Scored> {
    let logits = model.logits(x);
    let place = Tensor::from_slice(places).to_device(model.device);
    let row = place.divide_scalar_mode(model.config.vocab_size, "floor");
    let asked = logits.view([-1]).index_select(0, &place);
    let values = &asked - logits.logsumexp([-1i64], false).index_select(0, &row);
    let best = asked.ge_tensor(&logits.amax([-1i64], false).index_select(0, &row));
    let values = Vec::<f32>::try_from(&values.to_device(Device::Cpu)).expect("a vector of f32");
    let best = Vec::<bool>::try_from(&best.to_kind(Kind::Bool).to_device(Device::Cpu)).expect("a vector of bool");
    values.into_iter().map(f64::from).zip(best).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{LoadOptions, random_weights};

    fn model(kv_heads: usize, window: Option<usize>, kind: Kind) -> Decoder {
        tch::set_num_threads(1); // products this small are faster on one thread
        let config = json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 97,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
            "sliding_window": window,
        });
        random_weights(config.as_object().unwrap(), 7, LoadOptions::cpu(kind)).unwrap()
    }

    fn tokens(n: usize, seed: u32) -> Vec<u32> {
        (0..n as u32).map(|i| (i * i * 31 + i * 7 + seed * 13 + i / 5 * seed) % 97).collect()
    }

    /// Questions after one long header, with choices of one or more tokens, and texts that share nothing with them.
    fn sequences() -> (Vec<Vec<u32>>, Vec<usize>) {
        let header = tokens(560, 1);
        let (mut all, mut from) = (Vec::new(), Vec::new());
        for question in 0..12 {
            let context = [header.as_slice(), &tokens(25 + question as usize, question + 2)].concat();
            for choice in 0..4 {
                let long = if question % 3 == 0 { 1 } else { 1 + choice as usize * 3 };
                all.push([context.as_slice(), &tokens(long, 40 + choice)].concat());
                from.push(context.len());
            }
        }
        for other in 0..9 {
            all.push(tokens(3 + 11 * other as usize, 90 - other));
            from.push(1 + other as usize);
        }
        all.push(all[5].clone()); // a duplicate request
        from.push(from[5]);
        (all, from)
    }

    #[test]
    fn scores_do_not_move_with_batches_and_shared_beginnings() {
        let (all, from) = sequences();
        let slices: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        for (kv_heads, window) in [(4, None), (2, None), (1, Some(300))] {
            let model = model(kv_heads, window, Kind::Float);
            let alone: Vec<Vec<Scored>> = slices
                .iter()
                .zip(&from)
                .map(|(s, &f)| token_log_probs(&model, &[s]).unwrap()[0][f - 1..].to_vec())
                .collect();
            let mut largest = 0f64;
            for rows in [1, 64, 256, 2048, 16384] {
                let mut seen = vec![None; all.len()];
                log_probs_from::<ModelError>(&model, &slices, &from, rows, &mut |i, scored| {
                    assert!(seen[i].replace(scored).is_none(), "answered twice");
                    Ok(())
                })
                .unwrap();
                let seen: Vec<Vec<Scored>> = seen.into_iter().map(|s| s.expect("answered")).collect();
                // Sums agree within 1e-4, and every question has the same best choice.
                let sum = |s: &Vec<Scored>| s.iter().map(|t| t.0).sum::<f64>();
                assert!(alone.iter().zip(&seen).all(|(a, b)| (sum(a) - sum(b)).abs() < 1e-4));
                let best = |all: &[Vec<Scored>]| (0..4).max_by(|&a, &b| sum(&all[a]).total_cmp(&sum(&all[b])));
                assert!((0..48).step_by(4).all(|q| best(&alone[q..q + 4]) == best(&seen[q..q + 4])));
                for (alone, scored) in alone.iter().zip(&seen) {
                    assert_eq!(scored.len(), alone.len());
                    let pairs = alone.iter().zip(scored);
                    largest = pairs.fold(largest, |l, (a, b)| l.max((a.0 - b.0).abs()));
                }
            }
            eprintln!("{kv_heads} kv heads, window {window:?}: largest difference {largest:.1e}");
            // Log-probabilities near 5 in f32, with attention over some 600 keys computed in parts.
            assert!(largest < 2e-5, "{kv_heads} {window:?}: {largest}");
        }
    }

    #[test]
    fn an_error_of_the_receiver_ends_it_and_half_precision_stays_close() {
        let (all, from) = sequences();
        let slices: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        let sums = |kind: Kind, rows: usize| {
            let mut sums = vec![0.0; all.len()];
            log_probs_from::<ModelError>(&model(2, None, kind), &slices, &from, rows, &mut |i, s| {
                sums[i] = s.iter().map(|t| t.0).sum::<f64>() / s.len().max(1) as f64;
                Ok(())
            })
            .unwrap();
            sums
        };
        let exact = sums(Kind::Float, 256);
        for rows in [64, 2048] {
            let largest = exact.iter().zip(sums(Kind::BFloat16, rows)).fold(0f64, |l, (a, b)| l.max((a - b).abs()));
            // bf16 keeps 8 bits of values near 2, through some twenty roundings.
            assert!(largest < 0.1, "{rows}: {largest}");
        }
        let mut calls = 0;
        let stopped = log_probs_from::<ModelError>(&model(2, None, Kind::Float), &slices, &from, 64, &mut |_, _| {
            calls += 1;
            Err(ModelError::NotANumber)
        });
        assert!(matches!(stopped, Err(ModelError::NotANumber)) && calls == 1);
    }
}
