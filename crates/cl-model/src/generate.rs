use cl_torch::tch::{self, Tensor};
use rayon::prelude::*;

use crate::kv_cache::{KvCache, Prefix};
use crate::lookup::Lookup;
use crate::prefix_tree::{PrefixTree, common};
use crate::sampling::Decoding;
use crate::{Decoder, ModelError};

/// The continuation of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// New tokens, without the one that ended generation.
    pub ids: Vec<u32>,
    /// Whether generation ended by an end token or `stop`, not by the limit.
    pub stopped: bool,
}

/// Stopping criteria and decoding settings.
///
/// # Example
/// ```
/// use cl_model::{Decoding, GenerateOptions, Sampling};
///
/// let sampling = Sampling { temperature: 0.7, top_p: 0.9, seed: 1, ..Sampling::default() };
/// let options = GenerateOptions {
///     max_new_tokens: 32,
///     eos: &[2],
///     decoding: Decoding { sampling: Some(sampling), ..Decoding::default() },
///     ..GenerateOptions::default()
/// };
/// # assert_eq!(options.first_prompt, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerateOptions<'a> {
    /// Maximum number of new tokens.
    pub max_new_tokens: usize,
    /// End tokens.
    pub eos: &'a [u32],
    /// Decoding settings.
    pub decoding: Decoding,
    /// Index of the first prompt among all prompts, so that random numbers do not depend on batch sizes.
    pub first_prompt: usize,
}

/// Generates continuations of all prompts with greedy decoding (ties go to the lowest id); see [`generate`].
///
/// # Errors
/// Returns the errors of [`generate`].
pub fn greedy(
    model: &Decoder,
    prompts: &[&[u32]],
    max_new_tokens: usize,
    eos: &[u32],
    stop: &mut dyn FnMut(usize, &[u32]) -> bool,
) -> Result<Vec<Generation>, ModelError> {
    let options = GenerateOptions { max_new_tokens, eos, ..GenerateOptions::default() };
    generate(model, prompts, &options, stop)
}

/// Generates continuations of all prompts.
///
/// Shared prefixes are computed once, and their keys and values stored once; each step then adds a token to every
/// unfinished sequence. Greedy decoding can add several tokens per step if the text repeats itself (prompt lookup,
/// Saxena 2023: tokens are guessed from an earlier occurrence of the last tokens, and kept as far as the model agrees).
/// A sequence ends at one of `eos`, when `stop(index, ids)` returns true, or after `max_new_tokens`.
///
/// # Errors
/// [`ModelError::Setting`], [`ModelError::EmptySequence`], [`ModelError::TokenId`], [`ModelError::NotANumber`],
/// [`ModelError::Torch`].
pub fn generate(
    model: &Decoder,
    prompts: &[&[u32]],
    options: &GenerateOptions<'_>,
    stop: &mut dyn FnMut(usize, &[u32]) -> bool,
) -> Result<Vec<Generation>, ModelError> {
    options.decoding.validate()?;
    if let Some(index) = prompts.iter().position(|p| p.is_empty()) {
        return Err(ModelError::EmptySequence { index });
    }
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by(|&a, &b| prompts[a].cmp(prompts[b]));
    let sorted: Vec<&[u32]> = order.iter().map(|&i| prompts[i]).collect();
    let mut stop = |place: usize, ids: &[u32]| stop(order[place], ids);
    let none = (&Prefix::default(), 0);
    let (generations, _) = generate_behind(model, none, 0, (&sorted, &order), options, &mut stop)?;
    let mut results = vec![Generation { ids: Vec::new(), stopped: false }; prompts.len()];
    for (place, generation) in generations.into_iter().enumerate() {
        results[order[place]] = generation;
    }
    Ok(results)
}

/// Minimum length of a common prefix whose keys and values are stored separately.
const MIN_PREFIX: usize = 64;

/// [`greedy`] for sorted prompts with a common past of this many tokens; also returns the keys and values of the first
/// `keep` tokens of the last prompt.
pub(crate) fn greedy_behind(
    model: &Decoder,
    past: (&Prefix, usize),
    keep: usize,
    prompts: &[&[u32]],
    max_new_tokens: usize,
    eos: &[u32],
    stop: &mut dyn FnMut(usize, &[u32]) -> bool,
) -> Result<(Vec<Generation>, Prefix), ModelError> {
    let options = GenerateOptions { max_new_tokens, eos, ..GenerateOptions::default() };
    // Greedy decoding draws no random numbers, so the order of the prompts does not matter.
    let order: Vec<usize> = (0..prompts.len()).collect();
    generate_behind(model, past, keep, (prompts, &order), &options, stop)
}

/// [`generate`] for sorted prompts with a common past of this many tokens, each with its index before sorting; also
/// returns the keys and values of the first `keep` tokens of the last prompt.
pub(crate) fn generate_behind(
    model: &Decoder,
    (past, past_len): (&Prefix, usize),
    keep: usize,
    (prompts, order): (&[&[u32]], &[usize]),
    options: &GenerateOptions<'_>,
    stop: &mut dyn FnMut(usize, &[u32]) -> bool,
) -> Result<(Vec<Generation>, Prefix), ModelError> {
    let max_new_tokens = options.max_new_tokens;
    let mut results = vec![Generation { ids: Vec::new(), stopped: false }; prompts.len()];
    let mut kept = Prefix::of_len(keep);
    if prompts.is_empty() || (max_new_tokens == 0 && keep == 0) {
        return Ok((results, kept));
    }
    let _no_graph = tch::no_grad_guard();
    let longest = prompts.iter().map(|p| p.len()).max().unwrap_or(0) + max_new_tokens;
    let share = model.may_share(longest);
    let tree = PrefixTree::new(prompts, past_len, share);
    let paths: Vec<Vec<i64>> = (0..prompts.len()).map(|i| tree.rows(i)).collect();
    let common = common(prompts[0], prompts[prompts.len() - 1]);
    let prefix = if share && common >= MIN_PREFIX.max(past_len) { common } else { past_len };
    let on_device = |rows: &[i64]| Tensor::from_slice(rows).to_device(model.device);
    let own = on_device(&paths.iter().flat_map(|p| p[prefix - past_len..].iter().copied()).collect::<Vec<_>>());
    let prefix_rows = on_device(&paths[0][..prefix - past_len]);
    let kept_rows = on_device(&paths[prompts.len() - 1][..keep.saturating_sub(past_len)]);
    let lengths = prompts.iter().map(|p| (p.len() - prefix) as i64).collect();
    let mut cache = KvCache::for_prompts(prefix, lengths, model.device);
    let x = model.forward_tree(&tree, past, &mut |layer, k, v| {
        kept.store(past.layer(layer), &kept_rows, k, v);
        cache.prefix().store(past.layer(layer), &prefix_rows, k, v);
        cache.store_prompt(&k.index_select(0, &own), &v.index_select(0, &own));
    })?;
    if max_new_tokens == 0 {
        // Nothing is written, but the next batch goes on from what is kept.
        return Ok((results, kept));
    }
    let last: Vec<i64> = paths.iter().map(|p| p[p.len() - 1]).collect();
    let mut running: Vec<usize> = (0..prompts.len()).collect();
    let chooser = Chooser { options, prompts, order };
    let first = chooser.next(model, &x.index_select(0, &on_device(&last)), &running, &results)?;
    drop(x);
    let mut next: Vec<Vec<u32>> = first.into_iter().map(|id| vec![id]).collect();
    let mut texts: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
    let mut lookup = options.decoding.is_plain().then(|| Lookup::new(prompts.len()));
    loop {
        let mut going = Vec::new();
        for (slot, &index) in running.iter().enumerate() {
            let before = results[index].ids.len();
            if results[index].take(&next[slot], options, &mut |ids| stop(index, ids)) {
                going.push(slot as i64);
                texts[index].extend_from_slice(&results[index].ids[before..]);
            }
        }
        if going.is_empty() {
            return Ok((results, kept));
        }
        if going.len() < running.len() {
            cache.keep(&going);
            running = going.iter().map(|&s| running[s as usize]).collect();
        }
        let room = |index: usize| max_new_tokens - results[index].ids.len() - 1;
        let guess = |&index: &usize| lookup.as_ref()?.guess(index, &texts[index], room(index), running.len());
        let guesses: Vec<&[u32]> = running.iter().map(|index| guess(index).unwrap_or_default()).collect();
        let rows = running
            .iter()
            .zip(&guesses)
            .map(|(&index, guess)| [&texts[index][texts[index].len() - 1..], guess].concat());
        let rows: Vec<Vec<u32>> = rows.collect();
        let widths: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
        let ids: Vec<i64> = rows.iter().flatten().map(|&id| i64::from(id)).collect();
        let x = model.step(&on_device(&ids), &widths, &mut cache);
        next = match &mut lookup {
            Some(lookup) => {
                let mut chosen = likeliest(&model.logits(&x))?.into_iter();
                let texts = running.iter().zip(&guesses);
                texts.map(|(&index, guess)| lookup.check(index, guess, chosen.by_ref().take(1 + guess.len()))).collect()
            }
            None => chooser.next(model, &x, &running, &results)?.into_iter().map(|id| vec![id]).collect(),
        };
        cache.end_step(&next.iter().map(|ids| ids.len() as i64).collect::<Vec<_>>());
    }
}

impl Generation {
    /// Appends tokens until one of them ends the text; returns whether the text continues.
    fn take(&mut self, next: &[u32], options: &GenerateOptions<'_>, stop: &mut dyn FnMut(&[u32]) -> bool) -> bool {
        for &id in next {
            if options.eos.contains(&id) {
                self.stopped = true;
                return false;
            }
            self.ids.push(id);
            self.stopped = stop(&self.ids);
            if self.stopped || self.ids.len() >= options.max_new_tokens {
                return false;
            }
        }
        true
    }
}

/// Chooses tokens for the texts of a batch.
struct Chooser<'a> {
    options: &'a GenerateOptions<'a>,
    prompts: &'a [&'a [u32]],
    order: &'a [usize],
}

impl Chooser<'_> {
    /// The next token of every text in `running`; `x` is `(running, hidden)`.
    fn next(
        &self,
        model: &Decoder,
        x: &Tensor,
        running: &[usize],
        results: &[Generation],
    ) -> Result<Vec<u32>, ModelError> {
        let logits = model.logits(x);
        if self.options.decoding.is_plain() {
            return likeliest(&logits);
        }
        let vocab = logits.size()[1] as usize;
        let logits = logits.flatten(0, -1).to_device(tch::Device::Cpu);
        let mut scores = Vec::<f32>::try_from(&logits).expect("logits are f32");
        let rows = scores.par_chunks_mut(vocab).zip(running);
        rows.map(|(scores, &text)| self.choose(scores, text, &results[text].ids)).collect()
    }

    fn choose(&self, scores: &mut [f32], text: usize, output: &[u32]) -> Result<u32, ModelError> {
        let prompt = self.options.first_prompt + self.order[text];
        let history = [self.prompts[text], output].concat();
        self.options.decoding.choose(&history, scores, prompt as u64, output.len())
    }
}

fn likeliest(logits: &Tensor) -> Result<Vec<u32>, ModelError> {
    let ids = logits.argmax(-1, true);
    // A NaN is the largest of its row, so it would be taken for an answer.
    let largest = logits.gather(-1, &ids, false);
    if largest.isnan().any().int64_value(&[]) != 0 {
        return Err(ModelError::NotANumber);
    }
    let ids = ids.squeeze_dim(-1).to_device(tch::Device::Cpu);
    let ids = Vec::<i64>::try_from(&ids).expect("argmax of rows is a vector of int64");
    Ok(ids.into_iter().map(|id| id as u32).collect())
}
