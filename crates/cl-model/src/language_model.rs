use std::collections::HashMap;

use cl_data::Tokenizer;
use cl_eval::{
    Answer, Answered, BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest, ResponseCache,
    TokenRequest,
};

use crate::continuous::generate_prompts;
use crate::encoder::Encoder;
use crate::generation::{Batching, GenerateOptions, Generation, Receiver};
use crate::score::log_probs_from;
use crate::{Decoder, Decoding, ModelError};

/// A model with its tokenizer, which answers the requests of `cl-eval`.
///
/// Requests are tokenized as in lm-eval (Gao et al., `lm_eval/api/model.py`). Requests with a common prefix are
/// computed together, in packed batches of up to `batch_tokens` tokens without padding. With a cache, cached responses
/// are reused, and every response is saved as soon as it is known. Duplicate requests are computed once.
pub struct Scorer<'a> {
    /// The model.
    pub model: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Maximum number of tokens per forward pass.
    pub batch_tokens: usize,
    /// Maximum number of sequences that are generated at the same time.
    pub batch_sequences: usize,
    /// Maximum sequence length; longer prompts are truncated on the left, as in lm-eval.
    pub max_length: usize,
    /// Whether to prepend BOS to every text; `None` to do as the tokenizer does.
    pub add_bos_token: Option<bool>,
    /// Fingerprint of the model, which keeps cached responses of one model from being used for another.
    pub fingerprint: Option<String>,
    /// The response cache.
    pub cache: Option<ResponseCache>,
    /// Number of requests that were truncated so far.
    pub truncated: usize,
}

impl<'a> Scorer<'a> {
    /// Creates a scorer with defaults suitable for a CPU.
    pub fn new(model: &'a Decoder, tokenizer: &'a Tokenizer) -> Scorer<'a> {
        Scorer {
            model,
            tokenizer,
            batch_tokens: 2048,
            batch_sequences: 32,
            max_length: model.config.max_position_embeddings,
            add_bos_token: None,
            fingerprint: None,
            cache: None,
            truncated: 0,
        }
    }

    fn encoder(&self) -> Encoder<'a> {
        Encoder { tokenizer: self.tokenizer, add_bos_token: self.add_bos_token }
    }

    /// Truncates on the left to at most `room` tokens; returns the number of tokens removed.
    fn cut(&mut self, ids: &mut Vec<u32>, room: usize) -> usize {
        let cut = ids.len().saturating_sub(room);
        ids.drain(..cut);
        self.truncated += usize::from(cut > 0);
        cut
    }

    /// Passes cached responses to the callback. Returns the remaining distinct requests, each as the indices in `asked`
    /// at which it occurs.
    fn known<A>(
        &self,
        asked: &[TokenRequest<'_>],
        of: impl Fn(&Answer) -> Option<A>,
        answered: Answered<'_, A>,
    ) -> Result<Vec<Vec<usize>>, BoxError> {
        let mut open: Vec<Vec<usize>> = Vec::new();
        let mut places: HashMap<&TokenRequest<'_>, usize> = HashMap::new();
        for (i, request) in asked.iter().enumerate() {
            match self.cache.as_ref().and_then(|c| c.get(request)).and_then(&of) {
                Some(answer) => answered(i, answer)?,
                None => {
                    let place = *places.entry(request).or_insert(open.len());
                    if place == open.len() {
                        open.push(Vec::new());
                    }
                    open[place].push(i);
                }
            }
        }
        Ok(open)
    }

    fn remember(&mut self, request: &TokenRequest<'_>, answer: Answer) {
        if let Some(cache) = &mut self.cache {
            cache.put(request, answer);
        }
    }
}

impl LanguageModel for Scorer<'_> {
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError> {
        let mut items = self.encoder().pairs(requests)?;
        for ((ids, from), request) in items.iter_mut().zip(requests) {
            let (tokens, max_length) = (ids.len() - *from, self.max_length);
            if tokens > max_length {
                let continuation = request.continuation.chars().take(40).collect();
                return Err(ModelError::LongContinuation { continuation, tokens, max_length }.into());
            }
            let cut = self.cut(ids, self.max_length + 1);
            *from = from.saturating_sub(cut).max(1);
        }
        let asked: Vec<TokenRequest<'_>> =
            items.iter().map(|(tokens, from)| TokenRequest::Loglikelihood { tokens, from: *from }).collect();
        let known = |answer: &Answer| match answer {
            Answer::Loglikelihood(l) => Some(*l),
            Answer::Text(_) => None,
        };
        let open = self.known(&asked, known, answered)?;
        let sequences: Vec<&[u32]> = open.iter().map(|who| items[who[0]].0.as_slice()).collect();
        let from: Vec<usize> = open.iter().map(|who| items[who[0]].1).collect();
        let model = self.model;
        log_probs_from::<BoxError>(model, &sequences, &from, self.batch_tokens, &mut |place, tokens| {
            let sum = tokens.iter().map(|t| t.0).sum();
            let answer = Loglikelihood { sum, greedy: tokens.iter().all(|t| t.1), tokens: tokens.len() };
            self.remember(&asked[open[place][0]], Answer::Loglikelihood(answer));
            open[place].iter().try_for_each(|&i| answered(i, answer))
        })
    }

    fn generate(&mut self, requests: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError> {
        let mut prompts = self.encoder().prompts(requests)?;
        for (ids, request) in prompts.iter_mut().zip(requests) {
            self.cut(ids, self.max_length.saturating_sub(request.max_new_tokens).max(1));
        }
        let asked: Vec<TokenRequest<'_>> = prompts
            .iter()
            .zip(requests)
            .map(|(tokens, r)| TokenRequest::Generate { tokens, max_new_tokens: r.max_new_tokens, stop: &r.stop })
            .collect();
        let known = |answer: &Answer| match answer {
            Answer::Text(text) => Some(text.clone()),
            Answer::Loglikelihood(_) => None,
        };
        let open = self.known(&asked, known, answered)?;
        let all: Vec<&[u32]> = open.iter().map(|who| prompts[who[0]].as_slice()).collect();
        let of: Vec<&GenerateRequest> = open.iter().map(|who| &requests[who[0]]).collect();
        let limits: Vec<usize> = of.iter().map(|r| r.max_new_tokens).collect();
        let (model, eos) = (self.model, self.end_tokens());
        let batching = Batching::new(self.batch_sequences, self.batch_tokens);
        let options = GenerateOptions { eos: &eos, batching, decoding: self.decoding(), ..GenerateOptions::default() };
        let mut answers = Answers { scorer: self, requests: &of, asked: &asked, open: &open, answered };
        generate_prompts(model, &all, &limits, &options, &mut answers)
    }

    fn fingerprint(&self) -> Option<String> {
        self.fingerprint.clone()
    }
}

/// Decodes completed texts, caches them and passes them to the callback.
struct Answers<'r, 'a> {
    scorer: &'r mut Scorer<'a>,
    requests: &'r [&'r GenerateRequest],
    asked: &'r [TokenRequest<'r>],
    open: &'r [Vec<usize>], // for each distinct request, its indices in `asked`
    answered: Answered<'r, String>,
}

impl Receiver for Answers<'_, '_> {
    type Error = BoxError;

    fn stop(&mut self, index: usize, ids: &[u32]) -> bool {
        self.scorer.reached_stop(ids, &self.requests[index].stop)
    }

    fn done(&mut self, index: usize, generation: Generation) -> Result<(), BoxError> {
        let text = self.scorer.tokenizer.decode(&generation.ids, true)?;
        let end = self.requests[index].stop.iter().filter_map(|s| text.find(s.as_str())).min();
        let text = &text[..end.unwrap_or(text.len())];
        self.scorer.remember(&self.asked[self.open[index][0]], Answer::Text(text.to_owned()));
        self.open[index].iter().try_for_each(|&i| (self.answered)(i, text.to_owned()))
    }
}

impl Scorer<'_> {
    /// Token ids that end generation: those of the model's configuration and the tokenizer's EOS.
    pub fn end_tokens(&self) -> Vec<u32> {
        let mut ids = self.model.config.eos_token_ids.clone();
        ids.extend(self.tokenizer.eos_id());
        ids
    }

    /// Greedy decoding with the model's own repetition penalty, as Transformers decodes by default.
    fn decoding(&self) -> Decoding {
        Decoding { repetition_penalty: self.model.config.repetition_penalty, ..Decoding::default() }
    }

    /// Whether the text ends. As in lm-eval, stop strings are also found in the text with special tokens, such as the
    /// end of a turn; an answer never has them.
    fn reached_stop(&self, ids: &[u32], stop: &[String]) -> bool {
        if stop.is_empty() {
            return false;
        }
        // A stop string appears in the last few tokens; decoding all tokens at each step would take quadratic time.
        let longest = stop.iter().map(String::len).max().unwrap_or(0);
        let tail = &ids[ids.len().saturating_sub(longest + 4)..];
        let found = |skip: bool| {
            self.tokenizer.decode(tail, skip).is_ok_and(|text| stop.iter().any(|s| text.contains(s.as_str())))
        };
        found(true) || tail.iter().any(|&id| self.tokenizer.is_special(id)) && found(false)
    }
}

#[cfg(test)]
mod tests {
    use cl_torch::tch::Kind;
    use serde_json::json;

    use super::*;
    use crate::{LoadOptions, random_weights};

    fn tokenizer() -> Tokenizer {
        let special = json!({"id": 2, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}});
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::from_file(&path).unwrap()
    }

    fn model() -> Decoder {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 3,
            "max_position_embeddings": 6, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        });
        random_weights(config.as_object().unwrap(), 3, LoadOptions::cpu(Kind::Float)).unwrap()
    }

    #[test]
    fn a_special_token_can_be_a_stop_string() {
        let (model, tokenizer) = (model(), tokenizer());
        let scorer = Scorer::new(&model, &tokenizer);
        let stops = |ids: &[u32], stop: &str| scorer.reached_stop(ids, &[stop.to_owned()]);
        assert!(stops(&[0, 2], "<end>") && stops(&[0, 1], "ab") && stops(&[0, 2, 1], "<end>b"));
        assert!(!stops(&[0, 1], "<end>") && !stops(&[2], "b"));
    }

    #[test]
    fn the_models_own_repetition_penalty_changes_a_greedy_text() {
        let (mut model, tokenizer) = (model(), tokenizer());
        let text = |model: &Decoder| {
            let request = GenerateRequest { prompt: "ab".to_owned(), max_new_tokens: 4, stop: Vec::new() };
            let mut text = None;
            let mut scorer = Scorer::new(model, &tokenizer);
            scorer
                .generate(&[request], &mut |_, answer| {
                    text = Some(answer);
                    Ok(())
                })
                .unwrap();
            text.unwrap()
        };
        let plain = text(&model);
        model.config.repetition_penalty = 1e6;
        assert_ne!(plain, text(&model));
    }

    #[test]
    fn a_continuation_that_does_not_fit_is_an_error() {
        let (model, tokenizer) = (model(), tokenizer());
        let request = LoglikelihoodRequest { context: "a".to_owned(), continuation: "b".repeat(7) };
        let error = Scorer::new(&model, &tokenizer).loglikelihood(&[request], &mut |_, _| Ok(())).unwrap_err();
        assert!(error.to_string().contains("has 7 tokens, more than the maximum length of 6"), "{error}");
    }
}
