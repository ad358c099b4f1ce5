use crate::continuous::generate_prompts;
use crate::generation::{GenerateOptions, Generation, Receiver};
use crate::{Decoder, ModelError};

/// Generates continuations of all prompts with greedy decoding (ties go to the lowest token id); see [`generate`].
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
/// Shared prefixes are computed once, and their keys and values are stored once. Each step then adds a token to every
/// unfinished sequence. Greedy decoding can add several tokens per step if the text repeats itself, with prompt-lookup
/// decoding (Saxena, 2023): candidate tokens are copied from an earlier occurrence of the last tokens, and accepted as
/// far as the model agrees. As sequences are completed, waiting prompts take their place (`options.batching`). A
/// sequence ends at one of `eos`, when `stop(index, ids)` returns true, or after `max_new_tokens`.
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

/// Generates continuations like [`generate`], and passes each text to `receiver` as soon as it is complete, in any
/// order.
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
    generate_prompts(model, prompts, &vec![options.max_new_tokens; prompts.len()], options, receiver)
}

/// Collects the texts in the order of the prompts.
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
