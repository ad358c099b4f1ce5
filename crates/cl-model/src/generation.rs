use crate::ModelError;
use crate::prefix_tree::{Batch, Limits, batches};
use crate::sampling::Decoding;

/// The continuation of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generation {
    /// New tokens, without the end token.
    pub ids: Vec<u32>,
    /// Whether an end token or `stop` ended generation, rather than the limit on new tokens.
    pub stopped: bool,
}

/// Stopping criteria, decoding and batching settings.
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
    /// Index of the first prompt in the whole run, so that sampling does not depend on how prompts are split into
    /// calls.
    pub first_prompt: usize,
    /// Limits on what is computed at the same time.
    pub batching: Batching,
}

/// Limits on what is computed at the same time. There are none by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Maximum number of texts generated at the same time. Prompts are added in batches of a quarter of it.
    pub sequences: usize,
    /// Maximum number of prompt tokens per forward pass; a longer prompt is computed alone. The KV cache holds up to
    /// four times as many tokens.
    pub tokens: usize,
}

impl Default for Batching {
    fn default() -> Batching {
        Batching { sequences: usize::MAX, tokens: usize::MAX }
    }
}

/// Ratio of the prompt tokens of a generation batch to the tokens of a scoring batch. Every generation step reads all
/// weights, regardless of the number of texts, so larger batches pay off.
const GENERATED: usize = 4;

impl Batching {
    /// Creates limits for a model that scores `batch_tokens` tokens per forward pass; prompts are computed with four
    /// times as many.
    pub fn new(sequences: usize, batch_tokens: usize) -> Batching {
        Batching { sequences: sequences.max(1), tokens: batch_tokens.saturating_mul(GENERATED) }
    }

    /// Divides prompts into batches for one forward pass each. Without `share`, common prefixes are computed for each
    /// prompt.
    pub(crate) fn batches(&self, prompts: &[&[u32]], share: bool) -> Vec<Batch> {
        // Only the last token's logits are needed.
        let last: Vec<usize> = prompts.iter().map(|p| p.len().saturating_sub(1)).collect();
        let count = if self.sequences == usize::MAX { usize::MAX } else { (self.sequences / 4).max(1) };
        let limits = Limits { rows: self.tokens, count, places: self.room().places };
        let mut batches = batches(prompts, &last, limits, share);
        if batches.iter().all(|batch| batch.past == 0) {
            // If no batch depends on another, start with the first prompts, whose texts callers may be waiting for.
            batches.sort_by_key(|batch| batch.sequences.iter().min().copied());
        }
        batches
    }

    pub(crate) fn room(&self) -> Room {
        Room { sequences: self.sequences, places: self.tokens.saturating_mul(4) }
    }
}

/// Limits on the texts generated at the same time; a single batch may exceed them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Maximum number of texts.
    pub(crate) sequences: usize,
    /// Maximum number of texts times their maximum length, which is the size of the KV cache in tokens.
    pub(crate) places: usize,
}

/// Receives texts as they are generated, identified by the index of their prompt.
pub trait Receiver {
    /// Error type of the receiver, which also holds errors of generation.
    type Error: From<ModelError>;

    /// Returns whether the text with these new tokens ends here; called after each token.
    fn stop(&mut self, index: usize, ids: &[u32]) -> bool;

    /// Receives a completed text.
    ///
    /// # Errors
    /// An error ends the generation of all texts.
    fn done(&mut self, index: usize, generation: Generation) -> Result<(), Self::Error>;
}
