use cl_data::Tokenizer;
use cl_data::python::is_space;
use cl_eval::{GenerateRequest, LoglikelihoodRequest};
use rayon::prelude::*;

use crate::ModelError;

/// Tokenizes requests as lm-eval does.
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) add_bos_token: Option<bool>,
}

impl Encoder<'_> {
    /// Tokenizes contexts with their continuations; returns the tokens, and the index at which each continuation
    /// starts.
    ///
    /// Trailing white space of the context belongs to the continuation. The continuation's tokens are those of the
    /// whole text that exceed the number of tokens of the context alone, and follow the tokens of the context alone
    /// (lm-eval's rule). If the end of the context and the start of the continuation form one token, these are not the
    /// tokens of the whole text.
    pub(crate) fn pairs(&self, requests: &[LoglikelihoodRequest]) -> Result<Vec<(Vec<u32>, usize)>, ModelError> {
        // The choices of a question have the same context and are adjacent.
        let same: Vec<&[LoglikelihoodRequest]> = requests.chunk_by(|a, b| a.context == b.context).collect();
        let encoded: Result<Vec<_>, ModelError> = same.par_iter().map(|group| self.group(group)).collect();
        Ok(encoded?.into_iter().flatten().collect())
    }

    fn group(&self, group: &[LoglikelihoodRequest]) -> Result<Vec<(Vec<u32>, usize)>, ModelError> {
        let full = group[0].context.as_str();
        let context = full.trim_end_matches(is_space);
        let whole = |r: &LoglikelihoodRequest| format!("{full}{}", r.continuation);
        if context.is_empty() {
            // Without a context, the first token is scored after the token that starts a text.
            let start = self.prefix_token();
            let behind_start = |r| {
                let own = self.tokenizer.encode(&whole(r), false)?;
                if own.is_empty() {
                    return Err(ModelError::NoContinuation { context: String::new(), continuation: whole(r) });
                }
                let doubled = start.is_some() && own.first() == start.as_ref();
                Ok((start.into_iter().chain(own.into_iter().skip(usize::from(doubled))).collect(), 1))
            };
            return group.iter().map(behind_start).collect();
        }
        let before = self.encode(context)?;
        let behind_context = |r: &LoglikelihoodRequest| {
            let own = self.encode(&whole(r))?;
            let Some(continuation) = own.get(before.len()..).filter(|ids| !ids.is_empty()) else {
                let (context, continuation) = (end_of(full), r.continuation.clone());
                return Err(ModelError::NoContinuation { context, continuation });
            };
            Ok(([&before, continuation].concat(), before.len()))
        };
        group.iter().map(behind_context).collect()
    }

    /// Tokenizes prompts; returns at least one token per prompt if the tokenizer has a BOS or EOS token.
    pub(crate) fn prompts(&self, requests: &[GenerateRequest]) -> Result<Vec<Vec<u32>>, ModelError> {
        let encode = |r: &GenerateRequest| {
            let mut ids = self.encode(&r.prompt)?;
            if ids.is_empty() {
                ids.extend(self.prefix_token());
            }
            Ok(ids)
        };
        requests.par_iter().map(encode).collect()
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self.tokenizer.encode_with(text, self.add_bos_token)?)
    }

    /// The token that is prepended to an otherwise empty text: BOS, or EOS if the tokenizer has no BOS.
    fn prefix_token(&self) -> Option<u32> {
        self.tokenizer.bos_id().or(self.tokenizer.eos_id())
    }
}

/// The last characters of a text, for messages.
fn end_of(text: &str) -> String {
    let start = text.char_indices().rev().nth(39).map_or(0, |(start, _)| start);
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A tokenizer of single characters and the token `()`.
    fn tokenizer() -> Tokenizer {
        let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": {"a": 0, "(": 1, ")": 2, "b": 3, "()": 4}, "merges": [["(", ")"]]}});
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::from_file(&path).unwrap()
    }

    fn pairs(context: &str, continuation: &str) -> Result<(Vec<u32>, usize), ModelError> {
        let tokenizer = tokenizer();
        let encoder = Encoder { tokenizer: &tokenizer, add_bos_token: None };
        let (context, continuation) = (context.to_owned(), continuation.to_owned());
        let mut pairs = encoder.pairs(&[LoglikelihoodRequest { context, continuation }])?;
        Ok(pairs.remove(0))
    }

    #[test]
    fn a_continuation_follows_the_tokens_of_its_context_even_if_they_merge() {
        assert_eq!(pairs("a", "()b").unwrap(), (vec![0, 4, 3], 1));
        // The text as a whole is `a`, `()`, `b`: lm-eval's continuation is the third token, after `a` and `(`.
        assert_eq!(pairs("a(", ")b").unwrap(), (vec![0, 1, 3], 2));
    }

    #[test]
    fn a_continuation_without_a_token_is_an_error() {
        for (context, continuation) in [("a(", ")"), ("a", ""), ("", "")] {
            let message = pairs(context, continuation).unwrap_err().to_string();
            assert!(message.contains("adds no token to its context"), "{message}");
        }
    }
}
