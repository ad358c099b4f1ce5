use std::ops::Range;

use rayon::prelude::*;

use crate::conversation::encode_conversation;
use crate::{ChatTemplate, Error, Example, Profile, Tokenizer};

/// The tokens of an example, and which of them the loss covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// All tokens.
    pub input_ids: Vec<u32>,
    /// Ranges of the tokens that the loss covers, in order and disjoint.
    pub learned: Vec<Range<usize>>,
}

impl Encoded {
    /// Creates an example whose loss covers all tokens after the first `source_len`.
    pub fn new(input_ids: Vec<u32>, source_len: usize) -> Encoded {
        let target = source_len..input_ids.len();
        Encoded { learned: if target.is_empty() { Vec::new() } else { vec![target] }, input_ids }
    }

    /// Returns the labels: the token id where the loss covers it, −100 elsewhere.
    pub fn labels(&self) -> Vec<i64> {
        let mut labels = vec![-100; self.input_ids.len()];
        for range in &self.learned {
            for (label, &id) in labels[range.clone()].iter_mut().zip(&self.input_ids[range.clone()]) {
                *label = i64::from(id);
            }
        }
        labels
    }

    /// Returns the number of tokens that the loss covers, not counting the first token, which has no context.
    pub fn targets(&self) -> usize {
        self.learned.iter().map(|range| range.end.saturating_sub(range.start.max(1))).sum()
    }
}

/// Settings for tokenizing examples.
#[derive(Clone, Copy)]
pub struct Encoding<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template, required for conversations.
    pub chat: Option<&'a ChatTemplate>,
    /// Maximum number of tokens of an example; unlimited if `None`.
    pub max_length: Option<usize>,
    /// Profile: which definition of truncation applies.
    pub profile: Profile,
}

impl Encoding<'_> {
    /// Tokenizes an example.
    ///
    /// For a pair, the prompt is tokenized with the tokenizer's special tokens, and the answer followed by EOS
    /// separately without them, so that there is always a token boundary between the two; the middle is then truncated
    /// to `max_length` tokens. A conversation is rendered by the chat template; the loss covers the assistant's
    /// messages except those that are only context, and the end is truncated.
    ///
    /// # Errors
    /// Returns [`Error::NoEos`] or [`Error::Encode`] if the tokenizer has no EOS or fails, and
    /// [`Error::NoChatTemplate`] or [`Error::Chat`] if a conversation has no template or is rejected by it.
    pub fn example(&self, example: &Example) -> Result<Encoded, Error> {
        match example {
            Example::Pair { prompt, answer } => self.pair(prompt, answer),
            Example::Chat { messages, context } => {
                let template = self.chat.ok_or(Error::NoChatTemplate)?;
                encode_conversation(self.tokenizer, template, messages, *context, self.max_length)
            }
        }
    }

    /// Calls [`Encoding::example`] for all examples in parallel, keeping their order.
    ///
    /// # Errors
    /// Returns [`Error::Example`] with the index of the first example that fails.
    pub fn examples(&self, examples: &[Example]) -> Result<Vec<Encoded>, Error> {
        let numbered =
            |(row, example)| self.example(example).map_err(|source| Error::Example { row, source: Box::new(source) });
        examples.par_iter().enumerate().map(numbered).collect()
    }

    fn pair(&self, prompt: &str, answer: &str) -> Result<Encoded, Error> {
        let source = self.tokenizer.encode(prompt, true)?;
        let target = self.tokenizer.encode(&format!("{answer}{}", self.tokenizer.require_eos()?), false)?;
        let (source, target) = match self.max_length {
            Some(max) => truncate(source, target, max, self.profile),
            None => (source, target),
        };
        let source_len = source.len();
        Ok(Encoded::new([source, target].concat(), source_len))
    }
}

/// Truncates the middle as in the paper, with L source tokens, T target tokens and a maximum of M. If T > ⌊M/2⌋, the
/// source gets n₁ = ⌊L/(L+T)·M⌋ tokens and the end of the target (including EOS) is truncated; otherwise the target is
/// kept whole and n₁ = M − T. The source keeps its first ⌊n₁/2⌋ and its last n₁ − ⌊n₁/2⌋ tokens.
///
/// If n₁ = 0, the paper's code keeps the whole source (Python's `[-0:]`) and exceeds M; with the profile `method`,
/// nothing of the source is kept.
fn truncate(source: Vec<u32>, target: Vec<u32>, max: usize, profile: Profile) -> (Vec<u32>, Vec<u32>) {
    let (l, t) = (source.len(), target.len());
    if l + t <= max {
        return (source, target);
    }
    let (n1, target) = if t > max / 2 {
        // Computed in f64, as in Python.
        let n1 = (l as f64 / (l + t) as f64 * max as f64).floor() as usize;
        (n1, target[..(max - n1).min(t)].to_vec())
    } else {
        (max - t, target)
    };
    let head = n1 / 2;
    let tail = n1 - head;
    let source = match (tail, profile) {
        (0, Profile::Paper) => source,
        _ if n1 >= l => source,
        _ => [&source[..head], &source[l - tail..]].concat(),
    };
    (source, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(l: u32, t: u32, max: usize, profile: Profile) -> (Vec<u32>, Vec<u32>) {
        truncate((0..l).collect(), (100..100 + t).collect(), max, profile)
    }

    #[test]
    fn truncation_in_the_middle() {
        assert_eq!(cut(10, 3, 8, Profile::Paper), (vec![0, 1, 7, 8, 9], vec![100, 101, 102]));
        assert_eq!(cut(6, 6, 8, Profile::Paper), (vec![0, 1, 4, 5], vec![100, 101, 102, 103]));
        assert_eq!(cut(4, 4, 8, Profile::Method), ((0..4).collect(), (100..104).collect()));
    }

    #[test]
    fn a_source_without_room_follows_the_profile() {
        // n1 = ⌊1/21·8⌋ = 0
        assert_eq!(cut(1, 20, 8, Profile::Paper).0, [0]);
        assert!(cut(1, 20, 8, Profile::Method).0.is_empty());
        assert_eq!(cut(1, 20, 8, Profile::Method).1.len(), 8);
    }

    #[test]
    fn never_longer_than_allowed() {
        for l in 0..30 {
            for t in 1..30 {
                for max in 2..20 {
                    let (source, target) = cut(l, t, max, Profile::Method);
                    let all = (l + t) as usize;
                    assert_eq!(source.len() + target.len(), all.min(max), "{l} {t} {max}");
                    assert!(!target.is_empty());
                }
            }
        }
    }
}
