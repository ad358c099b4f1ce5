//! Continuous batching (Yu et al., "Orca", OSDI 2022): when texts are completed, waiting prompts take their place.

use std::collections::VecDeque;

use cl_torch::tch::{self, Tensor};
use rayon::prelude::*;

use crate::generation::{GenerateOptions, Generation, Receiver, Room};
use crate::kv_cache::{KvCache, Prefix};
use crate::lookup::Lookup;
use crate::prefix_tree::{Batch, PrefixTree, common};
use crate::{Decoder, ModelError};

/// Minimum length in tokens of a common prefix whose keys and values are stored separately.
const MIN_PREFIX: usize = 64;

/// The texts to generate.
pub(crate) struct Texts<'a> {
    /// The prompts.
    pub(crate) prompts: &'a [&'a [u32]],
    /// Maximum number of new tokens of each text.
    pub(crate) limits: &'a [usize],
    /// Batches of prompts, each computed in one forward pass; a batch may reuse the prefix kept from the one before it.
    pub(crate) batches: &'a [Batch],
    /// Limits on the texts generated at the same time.
    pub(crate) room: Room,
}

/// The prefixes at the two ends of a series of batches: the cached one before the first batch, and the one to keep of
/// the last prompt.
pub(crate) struct Ends<'a> {
    /// Cached keys and values that the first batch builds on.
    pub(crate) past: &'a Prefix,
    /// Number of leading tokens of the last prompt whose keys and values to keep.
    pub(crate) keep: usize,
}

/// A text being generated.
struct Text {
    index: usize,
    prompt: usize, // length of the prompt
    ids: Vec<u32>, // prompt and generated tokens
    limit: usize,
    next: Vec<u32>, // chosen tokens that are not yet appended to `ids`
    lookup: Lookup,
}

/// Texts that were prefilled in one batch, with their KV cache.
struct Group {
    texts: Vec<Text>,
    cache: KvCache,
    longest: usize, // maximum final length of a text, without the common prefix
}

/// Generates a text for each prompt, with at most as many new tokens as its entry in `limits`.
///
/// # Errors
/// Returns the errors of [`generate_all`].
pub(crate) fn generate_prompts<R: Receiver>(
    model: &Decoder,
    prompts: &[&[u32]],
    limits: &[usize],
    options: &GenerateOptions<'_>,
    receiver: &mut R,
) -> Result<(), R::Error> {
    let longest = prompts.iter().zip(limits).map(|(prompt, limit)| prompt.len() + limit).max().unwrap_or(0);
    let batches = options.batching.batches(prompts, model.may_share(longest));
    let texts = Texts { prompts, limits, batches: &batches, room: options.batching.room() };
    generate_all(model, &texts, options, Ends { past: &Prefix::default(), keep: 0 }, receiver)?;
    Ok(())
}

/// Generates all texts; returns the keys and values of the first `ends.keep` tokens of the last prompt.
///
/// # Errors
/// Returns an error of the receiver, or [`ModelError::TokenId`], [`ModelError::NotANumber`], [`ModelError::Setting`],
/// [`ModelError::Torch`].
pub(crate) fn generate_all<R: Receiver>(
    model: &Decoder,
    texts: &Texts<'_>,
    options: &GenerateOptions<'_>,
    ends: Ends<'_>,
    receiver: &mut R,
) -> Result<Prefix, R::Error> {
    let _no_graph = tch::no_grad_guard();
    let mut waiting: VecDeque<&Batch> = texts.batches.iter().collect();
    let mut groups: Vec<Group> = Vec::new();
    let mut kept = Prefix::default();
    let mut started = false;
    loop {
        while let Some(&batch) = waiting.front().filter(|batch| texts.fits(batch, &groups)) {
            waiting.pop_front();
            let keep = waiting.front().map_or(ends.keep, |next| next.past);
            let past = if started { &kept } else { ends.past };
            let (group, prefix) = texts.prefill(model, batch, past, keep, options)?;
            groups.push(group);
            (kept, started) = (prefix, true);
        }
        if groups.is_empty() {
            return Ok(kept);
        }
        let mut ended = false;
        for group in &mut groups {
            ended |= group.take(options, receiver)?;
        }
        groups.retain(|group| !group.texts.is_empty());
        // If texts were completed, waiting prompts may be added before the next step.
        let others = ended && waiting.front().is_some_and(|batch| texts.fits(batch, &groups));
        if !groups.is_empty() && !others {
            step(model, &mut groups, options)?;
        }
    }
}

impl Texts<'_> {
    fn fits(&self, batch: &Batch, groups: &[Group]) -> bool {
        let running: usize = groups.iter().map(|g| g.texts.len()).sum();
        let used: usize = groups.iter().map(|g| g.texts.len() * g.longest).sum();
        let longest = batch.sequences.iter().map(|&i| self.prompts[i].len() - batch.past + self.limits[i]).max();
        let places = batch.sequences.len() * longest.unwrap_or(0);
        running == 0 || (running + batch.sequences.len() <= self.room.sequences && used + places <= self.room.places)
    }

    /// Computes the prompts of a batch and chooses the first new token of each. Also returns the keys and values of the
    /// first `keep` tokens of the last prompt.
    fn prefill(
        &self,
        model: &Decoder,
        batch: &Batch,
        past: &Prefix,
        keep: usize,
        options: &GenerateOptions<'_>,
    ) -> Result<(Group, Prefix), ModelError> {
        let prompts: Vec<&[u32]> = batch.sequences.iter().map(|&i| self.prompts[i]).collect();
        let most = batch.sequences.iter().map(|&i| self.limits[i]).max().unwrap_or(0);
        let past_len = batch.past;
        let share = model.may_share(prompts.iter().map(|p| p.len()).max().unwrap_or(0) + most);
        let tree = PrefixTree::new(&prompts, past_len, share);
        let paths: Vec<Vec<i64>> = (0..prompts.len()).map(|i| tree.rows(i)).collect();
        let common = common(prompts[0], prompts[prompts.len() - 1]);
        let prefix = if share && common >= MIN_PREFIX.max(past_len) { common } else { past_len };
        let on_device = |rows: &[i64]| Tensor::from_slice(rows).to_device(model.device);
        let own = on_device(&paths.iter().flat_map(|p| p[prefix - past_len..].iter().copied()).collect::<Vec<_>>());
        let prefix_rows = on_device(&paths[0][..prefix - past_len]);
        let kept_rows = on_device(&paths[prompts.len() - 1][..keep.saturating_sub(past_len)]);
        let lengths: Vec<i64> = prompts.iter().map(|p| (p.len() - prefix) as i64).collect();
        let mut kept = Prefix::of_len(keep);
        let mut cache = KvCache::for_prompts(prefix, &lengths, model.compute, model.device);
        let last: Vec<i64> = paths.iter().map(|p| p[p.len() - 1]).collect();
        let x = model.forward_tree(&tree, past, &last, &mut |layer, k, v| {
            kept.store(past.layer(layer), &kept_rows, k, v);
            if most > 0 {
                let prefix = Prefix::of_layer(prefix, past.layer(layer), &prefix_rows, k, v);
                cache.store(prefix, &k.index_select(0, &own), &v.index_select(0, &own));
            }
        })?;
        cache.end_step(lengths);
        let texts = batch.sequences.iter().map(|&index| Text::new(index, self.prompts[index], self.limits[index]));
        let mut texts: Vec<Text> = texts.collect();
        if most > 0 {
            let first = choose(model, &x, &texts.iter().collect::<Vec<_>>(), options)?;
            texts.iter_mut().zip(first).for_each(|(text, id)| text.next = vec![id]);
        }
        let longest = texts.iter().map(|text| text.prompt - prefix + text.limit).max().unwrap_or(0);
        Ok((Group { texts, cache, longest }, kept))
    }
}

impl Group {
    /// Appends the chosen tokens to the texts, and passes completed texts to the receiver; returns whether there were
    /// any.
    fn take<R: Receiver>(&mut self, options: &GenerateOptions<'_>, receiver: &mut R) -> Result<bool, R::Error> {
        let before = self.texts.len();
        let mut going = Vec::new();
        for (place, mut text) in std::mem::take(&mut self.texts).into_iter().enumerate() {
            let index = text.index;
            match text.take(options, &mut |ids| receiver.stop(index, ids)) {
                Some(stopped) => receiver.done(index, Generation { ids: text.ids.split_off(text.prompt), stopped })?,
                None => {
                    going.push(place);
                    self.texts.push(text);
                }
            }
        }
        let ended = going.len() < before;
        if ended {
            self.cache.keep(&going);
        }
        Ok(ended)
    }
}

impl Text {
    fn new(index: usize, prompt: &[u32], limit: usize) -> Text {
        let (ids, next) = (prompt.to_vec(), Vec::new());
        Text { index, prompt: prompt.len(), ids, limit, next, lookup: Lookup::default() }
    }

    fn new_ids(&self) -> &[u32] {
        &self.ids[self.prompt..]
    }

    /// Appends the chosen tokens up to the one that completes the text. If the text is complete, returns whether an end
    /// token or `stop` ended it, and not the limit.
    fn take(&mut self, options: &GenerateOptions<'_>, stop: &mut dyn FnMut(&[u32]) -> bool) -> Option<bool> {
        for id in std::mem::take(&mut self.next) {
            if options.eos.contains(&id) {
                return Some(true);
            }
            self.ids.push(id);
            if stop(self.new_ids()) {
                return Some(true);
            }
            if self.new_ids().len() >= self.limit {
                return Some(false);
            }
        }
        (self.new_ids().len() >= self.limit).then_some(false)
    }

    /// Candidate tokens for greedy decoding with prompt lookup, while `running` texts are generated.
    fn guess(&self, running: usize) -> &[u32] {
        let room = self.limit - self.new_ids().len() - 1;
        self.lookup.guess(&self.ids, room, running).unwrap_or_default()
    }
}

/// Runs one forward pass over the last token of every text, followed in greedy decoding by its candidate tokens, and
/// chooses the next tokens.
fn step(model: &Decoder, groups: &mut [Group], options: &GenerateOptions<'_>) -> Result<(), ModelError> {
    let greedy = options.decoding.is_plain();
    let running = groups.iter().map(|g| g.texts.len()).sum();
    let mut rows: Vec<i64> = Vec::new();
    let mut guesses: Vec<Vec<u32>> = Vec::new();
    for group in &mut *groups {
        let first = guesses.len();
        for text in &group.texts {
            let guess = if greedy { text.guess(running) } else { &[] };
            rows.extend(text.ids.last().into_iter().chain(guess).map(|&id| i64::from(id)));
            guesses.push(guess.to_vec());
        }
        let widths: Vec<i64> = guesses[first..].iter().map(|guess| 1 + guess.len() as i64).collect();
        group.cache.begin_step(&widths);
    }
    let ids = Tensor::from_slice(&rows).to_device(model.device);
    let mut caches: Vec<&mut KvCache> = groups.iter_mut().map(|g| &mut g.cache).collect();
    let x = model.step(&ids, &mut caches);
    if greedy {
        let mut chosen = likeliest(&model.logits(&x))?.into_iter();
        let texts = groups.iter_mut().flat_map(|g| &mut g.texts);
        texts.zip(&guesses).for_each(|(text, guess)| {
            text.next = text.lookup.check(guess, chosen.by_ref().take(1 + guess.len()));
        });
    } else {
        let texts: Vec<&Text> = groups.iter().flat_map(|g| &g.texts).collect();
        let chosen = choose(model, &x, &texts, options)?;
        groups.iter_mut().flat_map(|g| &mut g.texts).zip(chosen).for_each(|(text, id)| text.next = vec![id]);
    }
    for group in groups {
        group.cache.end_step(group.texts.iter().map(|text| text.next.len() as i64));
    }
    Ok(())
}

/// Chooses the next token of every text; `x` is `(texts, hidden)`.
fn choose(model: &Decoder, x: &Tensor, texts: &[&Text], options: &GenerateOptions<'_>) -> Result<Vec<u32>, ModelError> {
    let logits = model.logits(x);
    if options.decoding.is_plain() {
        return likeliest(&logits);
    }
    let vocab = logits.size()[1] as usize;
    let logits = logits.flatten(0, -1).to_device(tch::Device::Cpu);
    let mut scores = Vec::<f32>::try_from(&logits).expect("logits are f32");
    let choose = |(scores, text): (&mut [f32], &&Text)| {
        let prompt = (options.first_prompt + text.index) as u64;
        options.decoding.choose(&text.ids, scores, prompt, text.new_ids().len())
    };
    scores.par_chunks_mut(vocab).zip(texts).map(choose).collect()
}

fn likeliest(logits: &Tensor) -> Result<Vec<u32>, ModelError> {
    let ids = logits.argmax(-1, true);
    // `argmax` returns a NaN as the largest element, so it would be mistaken for a token.
    let largest = logits.gather(-1, &ids, false);
    if largest.isnan().any().int64_value(&[]) != 0 {
        return Err(ModelError::NotANumber);
    }
    let ids = ids.squeeze_dim(-1).to_device(tch::Device::Cpu);
    let ids = Vec::<i64>::try_from(&ids).expect("argmax of rows is a vector of int64");
    Ok(ids.into_iter().map(|id| id as u32).collect())
}
