//! How well a model predicts texts: the loss of the examples of a file, and the perplexity of plain text.

use std::f64::consts::LN_2;

use cl_checkpoint::Interrupt;
use cl_data::python::is_space;
use cl_data::{ChatTemplate, Dataset, Encoding, Example, Profile, Tokenizer};
use cl_model::log_probs_from;
use serde::Serialize;

use crate::{LabError, LoadedModel};

/// How well a model predicts the examples of a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// Number of examples.
    pub documents: usize,
    /// Number of predicted tokens.
    pub tokens: usize,
    /// Mean negative log-likelihood of a token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// For plain text only: measures that do not depend on the tokenizer.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextPerplexity>,
}

/// Measures of plain text that can be compared between models with different tokenizers, as defined by
/// lm-evaluation-harness.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextPerplexity {
    /// Number of words: pieces between white space, as Python's `re.split(r"\s+", text)` counts them.
    pub words: usize,
    /// Number of bytes in UTF-8.
    pub bytes: usize,
    /// `exp(negative log-likelihood / words)`
    pub word_perplexity: f64,
    /// `exp(negative log-likelihood / bytes)`
    pub byte_perplexity: f64,
    /// `negative log-likelihood / bytes / ln 2`
    pub bits_per_byte: f64,
}

/// Settings of [`perplexity`].
#[derive(Clone, Copy, Debug)]
pub struct PerplexityOptions {
    /// Maximum number of tokens that the model sees; `None` for its context length.
    pub max_length: Option<usize>,
    /// Maximum number of tokens per forward pass.
    pub batch_tokens: usize,
}

/// Computes how well a model predicts the examples of a data set.
///
/// Plain text (examples without a prompt) is predicted from its first token on, after the tokenizer's BOS or EOS token.
/// Longer texts are divided into windows, as in lm-evaluation-harness: each window starts with the last token of the
/// previous one, the last window has as much context as fits, and every token is predicted once. Of other examples, the
/// tokens that the loss of training covers are predicted; examples that are too long are truncated as in training.
///
/// # Errors
/// Returns [`LabError::MixedTexts`] if the data set has both plain text and other examples,
/// [`LabError::NothingToPredict`] if it has no token to predict, and an error if an example cannot be tokenized, if the
/// model computes NaN, or if a stop was requested.
pub fn perplexity(
    loaded: &LoadedModel,
    chat: Option<&ChatTemplate>,
    data: &Dataset,
    options: PerplexityOptions,
    interrupt: &Interrupt,
) -> Result<Perplexity, LabError> {
    let max_length = options.max_length.unwrap_or(loaded.model.config.max_position_embeddings);
    let texts: Vec<&str> = data.examples.iter().filter_map(plain).collect();
    let items = if texts.len() == data.examples.len() {
        windows_of(&loaded.tokenizer, &texts, max_length).map_err(LabError::data(&data.path))?
    } else if texts.is_empty() {
        let max_length = Some(max_length);
        let encoding = Encoding { tokenizer: &loaded.tokenizer, chat, max_length, profile: Profile::Method };
        supervised(encoding, &data.examples).map_err(LabError::data(&data.path))?
    } else {
        return Err(LabError::MixedTexts { path: data.path.clone() });
    };
    let sequences: Vec<&[u32]> = items.iter().map(|item| item.ids.as_slice()).collect();
    let from: Vec<usize> = items.iter().map(|item| item.first()).collect();
    let (mut sums, mut tokens) = (vec![0.0; items.len()], 0);
    log_probs_from::<LabError>(&loaded.model, &sequences, &from, options.batch_tokens, &mut |place, scored| {
        if interrupt.requested() {
            return Err(LabError::Interrupted);
        }
        let item = &items[place];
        let wanted = scored.iter().zip(from[place]..).filter(|(_, token)| item.predicts(*token));
        let (sum, count) = wanted.fold((0.0, 0), |(sum, count), ((value, _), _)| (sum + value, count + 1));
        (sums[place], tokens) = (sum, tokens + count);
        Ok(())
    })?;
    if tokens == 0 {
        return Err(LabError::NothingToPredict { path: data.path.clone() });
    }
    // Summed in the order of the examples, so that the result does not depend on batches.
    let nats = -sums.iter().sum::<f64>();
    let loss = nats / tokens as f64;
    let text = (!texts.is_empty()).then(|| TextPerplexity::new(nats, &texts));
    Ok(Perplexity { documents: data.examples.len(), tokens, loss, perplexity: loss.exp(), text })
}

impl TextPerplexity {
    fn new(nats: f64, texts: &[&str]) -> TextPerplexity {
        let words: usize = texts.iter().map(|text| words(text)).sum();
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        let (per_word, per_byte) = (nats / words as f64, nats / bytes as f64);
        TextPerplexity {
            words,
            bytes,
            word_perplexity: per_word.exp(),
            byte_perplexity: per_byte.exp(),
            bits_per_byte: per_byte / LN_2,
        }
    }
}

/// The text of an example that has no prompt.
fn plain(example: &Example) -> Option<&str> {
    match example {
        Example::Pair { prompt, answer } if prompt.is_empty() => Some(answer),
        _ => None,
    }
}

/// Number of pieces between runs of white space, including empty ones at both ends.
fn words(text: &str) -> usize {
    let mut inside = false;
    let runs = text.chars().filter(|&c| {
        let starts = is_space(c) && !inside;
        inside = is_space(c);
        starts
    });
    runs.count() + 1
}

/// A sequence of tokens, of which some are predicted.
struct Item {
    ids: Vec<u32>,
    /// Positions of the predicted tokens.
    predicted: Vec<std::ops::Range<usize>>,
}

impl Item {
    /// The first position that is predicted; the first token of a sequence never is.
    fn first(&self) -> usize {
        self.predicted.first().map_or(self.ids.len(), |range| range.start).max(1)
    }

    fn predicts(&self, token: usize) -> bool {
        self.predicted.iter().any(|range| range.contains(&token))
    }
}

fn supervised(encoding: Encoding<'_>, examples: &[Example]) -> Result<Vec<Item>, cl_data::Error> {
    let encoded = encoding.examples(examples)?;
    Ok(encoded.into_iter().map(|e| Item { ids: e.input_ids, predicted: e.learned }).collect())
}

fn windows_of(tokenizer: &Tokenizer, texts: &[&str], max_length: usize) -> Result<Vec<Item>, cl_data::Error> {
    let start = tokenizer.bos_id().or(tokenizer.eos_id());
    let mut items = Vec::new();
    for text in texts {
        items.extend(windows(start, &tokenizer.encode(text, false)?, max_length));
    }
    Ok(items)
}

/// Divides a text into sequences of at most `max_length` tokens to see, which together predict every token once.
fn windows(start: Option<u32>, text: &[u32], max_length: usize) -> Vec<Item> {
    let ids: Vec<u32> = start.into_iter().chain(text.iter().copied()).collect();
    let mut items = Vec::new();
    let mut next = 1;
    while next < ids.len() {
        let end = (next + max_length).min(ids.len());
        // The last token of a window is not seen, only predicted. The last window is shorter, and is filled up with
        // earlier tokens.
        let begin = if next == 1 { 0 } else { end.saturating_sub(max_length + 1) };
        let predicted = next - begin..end - begin;
        items.push(Item { ids: ids[begin..end].to_vec(), predicted: Vec::from([predicted]) });
        next = end;
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ```python
    /// [make_disjoint_window(w) for w in get_rolling_token_windows(list(range(10, 10 + n)), 1, max_seq_len, 1)]
    /// ```
    /// of lm_eval.utils, as the tokens seen and the predicted ones.
    #[test]
    fn windows_are_those_of_lm_eval() {
        type Windows<'a> = &'a [(&'a [u32], &'a [u32])]; // tokens seen, and predicted
        let cases: [(u32, usize, Windows<'_>); 4] = [
            (3, 4, &[(&[1, 10, 11], &[10, 11, 12])]),
            (4, 4, &[(&[1, 10, 11, 12], &[10, 11, 12, 13])]),
            (6, 4, &[(&[1, 10, 11, 12], &[10, 11, 12, 13]), (&[11, 12, 13, 14], &[14, 15])]),
            (
                9,
                4,
                &[
                    (&[1, 10, 11, 12], &[10, 11, 12, 13]),
                    (&[13, 14, 15, 16], &[14, 15, 16, 17]),
                    (&[14, 15, 16, 17], &[18]),
                ],
            ),
        ];
        for (n, max_length, expected) in cases {
            let text: Vec<u32> = (10..10 + n).collect();
            let items = windows(Some(1), &text, max_length);
            assert_eq!(items.len(), expected.len());
            for (item, (seen, predicted)) in items.iter().zip(expected) {
                assert_eq!(&item.ids[..item.ids.len() - 1], *seen);
                assert_eq!(&item.ids[item.predicted[0].clone()], *predicted);
                assert_eq!((item.predicted.len(), item.first()), (1, item.predicted[0].start));
            }
        }
        assert!(windows(Some(1), &[], 4).is_empty());
        // Without a token that starts a text, its first token is not predicted.
        assert_eq!(windows(None, &[10, 11, 12], 4)[0].predicted[0], 1..3);
    }

    /// ```python
    /// [len(re.split(r"\s+", text)) for text in texts]
    /// ```
    #[test]
    fn words_are_counted_as_in_python() {
        for (text, count) in [("a b\n\nc", 3), (" a ", 3), ("", 1), ("a\u{a0}b\u{2028}c", 3), ("\n", 2), ("ab", 1)] {
            assert_eq!(words(text), count, "{text:?}");
        }
    }
}
