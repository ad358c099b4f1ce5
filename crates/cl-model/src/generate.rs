use crate::continuous::{Batching, Ends, Receiver, Texts, generate_all};
use crate::kv_cache::Prefix;
use crate::sampling::Decoding;
use crate::{Decoder, ModelError};

/// The continuation of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// How many texts are generated at the same time.
    pub batching: Batching,
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
/// As sequences are completed, waiting prompts take their place (`options.batching`). A sequence ends at one of `eos`, when
/// `stop(index, ids)` returns true, or after `max_new_tokens`.
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
    let mut all = All { stop, generations: vec![Generation::default(); prompts.len()] };
    generate_each(model, prompts, options, &mut all)?;
    Ok(all.generations)
}

/// Generates continuations of all prompts as [`generate`], and hands over each text as soon as it is complete, in any order.
///
/// # Errors
/// Returns the errors of [`generate`] and those of `receiver`, which end the generation of all texts.
pub fn generate_each<R: Receiver>(
    model: &Decoder,
    prompts: &[&[u32]],
    options: &GenerateOptions<'_>,
    receiver: &mut R,
) -> Result<(), R::Error> {
    options.decoding.validate()?;
    if let Some(index) = prompts.iter().position(|p| p.is_empty()) {
        return Err(ModelError::EmptySequence { index }.into());
    }
    let longest = prompts.iter().map(|p| p.len()).max().unwrap_or(0) + options.max_new_tokens;
    let batches = options.batching.batches(prompts, model.may_share(longest));
    let limits = vec![options.max_new_tokens; prompts.len()];
    let texts = Texts { prompts, limits: &limits, batches: &batches, room: options.batching.room() };
    generate_all(model, &texts, options, Ends { past: &Prefix::default(), keep: 0 }, receiver)?;
    Ok(())
}

/// Collects the texts.
struct All<'a> {
    stop: &'a mut dyn FnMut(usize, &[u32]) -> bool,
    generations: Vec<Generation>,
}

impl Receiver for All<'_> {
    type Error = ModelError;

    fn stop(&mut self, index: usize, ids: &[u32]) -> bool {
        (self.stop)(index, ids)
    }

    fn done(&mut self, index: usize, generation: Generation) -> Result<(), ModelError> {
        self.generations[index] = generation;
        Ok(())
    }
}
