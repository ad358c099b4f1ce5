use std::collections::VecDeque;

use cl_data::Tokenizer;
use cl_eval::{Answered, BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest};

use crate::score::log_probs_from;
use crate::{Decoder, ModelError, greedy};

/// A model with its tokenizer, answering the requests of `cl-eval`.
///
/// Requests are sorted by length and answered in packed batches of up to `batch_tokens` tokens; answers come back in the
/// order of the requests.
pub struct Scorer<'a> {
    /// The model.
    pub model: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that one forward pass may hold.
    pub batch_tokens: usize,
    /// Sequences that are generated together.
    pub batch_sequences: usize,
    /// Longest sequence the model may see; longer prompts lose tokens on their left, as lm-eval does.
    pub max_length: usize,
    /// What tells this model from others, so that its saved answers are not taken for another's.
    pub fingerprint: Option<String>,
}

impl<'a> Scorer<'a> {
    /// Batches that suit a CPU.
    pub fn new(model: &'a Decoder, tokenizer: &'a Tokenizer) -> Scorer<'a> {
        let max_length = model.config.max_position_embeddings;
        Scorer { model, tokenizer, batch_tokens: 4096, batch_sequences: 32, max_length, fingerprint: None }
    }

    /// Tokens of context and continuation, and where the continuation starts.
    ///
    /// Spaces at the end of the context belong to the continuation, whose tokens are those of the whole text beyond as many
    /// as the context alone has (lm-eval's rule).
    fn encode_pair(&self, request: &LoglikelihoodRequest) -> Result<(Vec<u32>, usize), ModelError> {
        let context = request.context.trim_end();
        let moved = &request.context[context.len()..];
        if context.is_empty() {
            // With nothing in front, the first token is scored after BOS, or EOS for a tokenizer without BOS.
            let start = self.tokenizer.bos_id().or(self.tokenizer.eos_id());
            let text = format!("{}{}", request.context, request.continuation);
            let mut ids: Vec<u32> = start.into_iter().collect();
            let from = ids.len();
            ids.extend(self.tokenizer.encode(&text, false)?);
            return Ok((ids, from));
        }
        let from = self.tokenizer.encode(context, true)?.len();
        let whole = self.tokenizer.encode(&format!("{context}{moved}{}", request.continuation), true)?;
        Ok((whole, from))
    }
}

impl LanguageModel for Scorer<'_> {
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError> {
        let mut items = Vec::with_capacity(requests.len());
        for request in requests {
            let (mut ids, mut from) = self.encode_pair(request)?;
            let cut = ids.len().saturating_sub(self.max_length + 1);
            ids.drain(..cut);
            from = from.saturating_sub(cut).max(1);
            items.push((ids, from));
        }
        for batch in batches(&items.iter().map(|i| i.0.len()).collect::<Vec<_>>(), self.batch_tokens, usize::MAX) {
            let sequences: Vec<&[u32]> = batch.iter().map(|&i| items[i].0.as_slice()).collect();
            let from: Vec<usize> = batch.iter().map(|&i| items[i].1).collect();
            for (&i, tokens) in batch.iter().zip(log_probs_from(self.model, &sequences, &from)?) {
                let sum = tokens.iter().map(|t| t.0).sum();
                answered(i, Loglikelihood { sum, greedy: tokens.iter().all(|t| t.1), tokens: tokens.len() })?;
            }
        }
        Ok(())
    }

    fn generate(&mut self, requests: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError> {
        let mut prompts = Vec::with_capacity(requests.len());
        for request in requests {
            let mut ids = self.tokenizer.encode(&request.prompt, true)?;
            if ids.is_empty() {
                ids.extend(self.tokenizer.bos_id().or(self.tokenizer.eos_id()));
            }
            let room = self.max_length.saturating_sub(request.max_new_tokens).max(1);
            let cut = ids.len().saturating_sub(room);
            ids.drain(..cut);
            prompts.push(ids);
        }
        let eos = self.end_tokens();
        let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        for batch in batches(&lengths, self.batch_tokens, self.batch_sequences) {
            let ids: Vec<&[u32]> = batch.iter().map(|&i| prompts[i].as_slice()).collect();
            let limit = batch.iter().map(|&i| requests[i].max_new_tokens).max().unwrap_or(0);
            let generations = greedy(self.model, &ids, limit, &eos, &mut |slot, new| {
                let request = &requests[batch[slot]];
                new.len() >= request.max_new_tokens || self.reached_stop(new, &request.stop)
            })?;
            for (&i, generation) in batch.iter().zip(generations) {
                let text = self.tokenizer.decode(&generation.ids, true)?;
                let end = requests[i].stop.iter().filter_map(|s| text.find(s.as_str())).min();
                answered(i, text[..end.unwrap_or(text.len())].to_owned())?;
            }
        }
        Ok(())
    }

    fn fingerprint(&self) -> Option<String> {
        self.fingerprint.clone()
    }
}

impl Scorer<'_> {
    /// Ids that end a generation: those of config.json and the tokenizer's EOS.
    pub fn end_tokens(&self) -> Vec<u32> {
        let mut ids = self.model.config.eos_token_ids.clone();
        ids.extend(self.tokenizer.eos_id());
        ids
    }

    fn reached_stop(&self, ids: &[u32], stop: &[String]) -> bool {
        if stop.is_empty() {
            return false;
        }
        // A stop text shows up in the last few tokens; decoding all of them at each step would be quadratic.
        let longest = stop.iter().map(String::len).max().unwrap_or(0);
        let tail = &ids[ids.len().saturating_sub(longest + 4)..];
        self.tokenizer.decode(tail, true).is_ok_and(|text| stop.iter().any(|s| text.contains(s.as_str())))
    }
}

/// Groups items, longest first, so that a group holds at most `tokens` tokens (one item may exceed that) and `count` items.
fn batches(lengths: &[usize], tokens: usize, count: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lengths[i]), i));
    let mut queue: VecDeque<usize> = order.into();
    let mut groups = Vec::new();
    while let Some(first) = queue.pop_front() {
        let mut group = vec![first];
        let mut sum = lengths[first];
        while let Some(&next) = queue.front() {
            if group.len() >= count || sum + lengths[next] > tokens {
                break;
            }
            sum += lengths[next];
            group.push(next);
            queue.pop_front();
        }
        groups.push(group);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_everything_once_within_the_budget() {
        let lengths = [3, 9, 1, 4, 4, 20, 2];
        let groups = batches(&lengths, 10, 3);
        let mut all: Vec<usize> = groups.iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
        for group in groups {
            let sum: usize = group.iter().map(|&i| lengths[i]).sum();
            assert!(group.len() == 1 || sum <= 10, "{group:?}");
            assert!(group.len() <= 3);
        }
    }
}
