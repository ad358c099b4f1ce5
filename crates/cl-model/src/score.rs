use cl_torch::tch::{self, Device, Kind, Tensor};

use crate::kv_cache::Prefix;
use crate::prefix_tree::{PrefixTree, batches};
use crate::{Decoder, ModelError};

/// Log-probability (natural) of a token, and whether it was the likeliest one.
pub(crate) type Scored = (f64, bool);

/// Log-probability (natural) of every token of a sequence given those before it, from its second token on, and whether it
/// was the likeliest one.
///
/// # Errors
/// [`ModelError::EmptySequence`], [`ModelError::TokenId`], [`ModelError::Torch`].
pub fn token_log_probs(model: &Decoder, sequences: &[&[u32]]) -> Result<Vec<Vec<(f64, bool)>>, ModelError> {
    if let Some(index) = sequences.iter().position(|s| s.is_empty()) {
        return Err(ModelError::EmptySequence { index });
    }
    let mut all = vec![Vec::new(); sequences.len()];
    let from = vec![1; sequences.len()];
    score(model, sequences, &from, usize::MAX, &mut |i, scored| {
        all[i] = scored;
        Ok::<(), ModelError>(())
    })?;
    Ok(all)
}

/// Rows of logits that exist at one time.
const CHUNK: usize = 256;

/// Scores the tokens of every sequence from `from[i]` (at least 1) on, in batches of at most `rows` rows, and hands over
/// the scores of each sequence as soon as they are known.
///
/// What sequences begin with alike is computed once, their last tokens are not fed at all, and the head sees only rows behind
/// which a token is scored: choices of one token are read from a single row.
pub(crate) fn score<E: From<ModelError>>(
    model: &Decoder,
    sequences: &[&[u32]],
    from: &[usize],
    rows: usize,
    scored: &mut dyn FnMut(usize, Vec<Scored>) -> Result<(), E>,
) -> Result<(), E> {
    let _no_graph = tch::no_grad_guard();
    let (open, nothing): (Vec<usize>, Vec<usize>) = (0..sequences.len()).partition(|&i| sequences[i].len() > from[i]);
    for i in nothing {
        scored(i, Vec::new())?;
    }
    let fed: Vec<&[u32]> = open.iter().map(|&i| &sequences[i][..sequences[i].len() - 1]).collect();
    let wanted: Vec<usize> = open.iter().map(|&i| from[i].max(1) - 1).collect();
    let share = model.may_share(fed.iter().map(|s| s.len()).max().unwrap_or(0));
    let plan = batches(&fed, &wanted, rows, usize::MAX, share);
    let mut past = Prefix::default();
    for (batch, next) in plan.iter().zip(plan.iter().skip(1).map(|b| b.past).chain([0])) {
        let own: Vec<&[u32]> = batch.sequences.iter().map(|&s| fed[s]).collect();
        let tree = PrefixTree::new(&own, batch.past, share);
        let last = tree.rows(own.len() - 1);
        let kept_rows = Tensor::from_slice(&last[..next.saturating_sub(batch.past)]).to_device(model.device);
        let mut kept = Prefix::of_len(next);
        let x = model.forward_tree(&tree, &past, &mut |layer, k, v| kept.store(past.layer(layer), &kept_rows, k, v))?;
        past = kept;
        let mut questions = Questions::default();
        for (place, &s) in batch.sequences.iter().enumerate() {
            let path = tree.rows(place);
            for t in wanted[s]..fed[s].len() {
                questions.ask(path[t - batch.past], sequences[open[s]][t + 1]);
            }
        }
        let mut answers = questions.answer(model, &x)?.into_iter();
        for &s in &batch.sequences {
            scored(open[s], answers.by_ref().take(fed[s].len() - wanted[s]).collect())?;
        }
    }
    Ok(())
}

/// How likely are tokens behind rows? A row may be asked about several tokens.
#[derive(Default)]
struct Questions {
    asked: Vec<(i64, i64)>, // row and token
}

impl Questions {
    fn ask(&mut self, row: i64, token: u32) {
        self.asked.push((row, i64::from(token)));
    }

    /// In the order of the questions.
    fn answer(&self, model: &Decoder, x: &Tensor) -> Result<Vec<Scored>, ModelError> {
        let vocab_size = model.config.vocab_size;
        if let Some(&(_, id)) = self.asked.iter().find(|(_, id)| *id >= vocab_size) {
            return Err(ModelError::TokenId { id, vocab_size });
        }
        let mut order: Vec<usize> = (0..self.asked.len()).collect();
        order.sort_by_key(|&i| self.asked[i]);
        let mut answers = vec![(0.0, false); self.asked.len()];
        let mut from = 0;
        while from < order.len() {
            let mut rows: Vec<i64> = Vec::new();
            let mut places: Vec<i64> = Vec::new(); // in the flattened (rows · vocab)
            let mut to = from;
            while let Some(&(row, token)) = order.get(to).map(|&i| &self.asked[i]) {
                if rows.last() != Some(&row) {
                    if rows.len() == CHUNK {
                        break;
                    }
                    rows.push(row);
                }
                places.push((rows.len() as i64 - 1) * vocab_size + token);
                to += 1;
            }
            let chunk = log_probs(model, x, &rows, &places);
            order[from..to].iter().zip(chunk).for_each(|(&i, answer)| answers[i] = answer);
            from = to;
        }
        Ok(answers)
    }
}

fn log_probs(model: &Decoder, x: &Tensor, rows: &[i64], places: &[i64]) -> Vec<Scored> {
    let on_device = |of: &[i64]| Tensor::from_slice(of).to_device(model.device);
    let logits = model.logits(&x.index_select(0, &on_device(rows)));
    let place = on_device(places);
    let row = place.divide_scalar_mode(model.config.vocab_size, "floor");
    let asked = logits.view([-1]).index_select(0, &place);
    let values = &asked - logits.logsumexp([-1i64], false).index_select(0, &row);
    let best = asked.ge_tensor(&logits.amax([-1i64], false).index_select(0, &row));
    let values = Vec::<f32>::try_from(&values.to_device(Device::Cpu)).expect("a vector of f32");
    let best = Vec::<bool>::try_from(&best.to_kind(Kind::Bool).to_device(Device::Cpu)).expect("a vector of bool");
    values.into_iter().map(f64::from).zip(best).collect()
}
