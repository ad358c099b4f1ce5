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
    /// whole text that exceed the number of tokens of the context alone (lm-eval's rule).
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
                let doubled = start.is_some() && own.first() == start.as_ref();
                Ok((start.into_iter().chain(own.into_iter().skip(usize::from(doubled))).collect(), 1))
            };
            return group.iter().map(behind_start).collect();
        }
        let from = self.encode(context)?.len();
        group.iter().map(|r| Ok((self.encode(&whole(r))?, from))).collect()
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
