use crate::continuous::{Ends, Texts, generate_all};
use crate::generation::{Batching, GenerateOptions, Generation, Receiver};
use crate::kv_cache::Prefix;
use crate::prefix_tree::{Batch, common};
use crate::{Decoder, ModelError};

/// Generates for a series of prompts that mostly extend the previous one, such as the turns of a conversation. The KV
/// cache of shared tokens is kept, so that only new tokens are computed.
///
/// # Example
/// ```
/// use cl_model::{GenerateOptions, LoadOptions, Session, greedy, random_weights};
/// use cl_torch::tch::Kind;
///
/// # let config = serde_json::json!({
/// #     "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
/// #     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true
/// # });
/// # let config = config.as_object().unwrap();
/// let model = random_weights(config, 1, LoadOptions::cpu(Kind::Float))?;
/// let options = GenerateOptions { max_new_tokens: 4, ..GenerateOptions::default() };
/// let mut session = Session::new(&model);
/// let first = session.generate(&[1, 2, 3], &options, &mut |_| false)?;
/// let prompt = [&[1, 2, 3], first.ids.as_slice(), &[9]].concat();
/// let second = session.generate(&prompt, &options, &mut |_| false)?;
/// assert_eq!(second, greedy(&model, &[&prompt], 4, &[], &mut |_, _| false)?[0]);
/// # Ok::<(), cl_model::ModelError>(())
/// ```
pub struct Session<'a> {
    model: &'a Decoder,
    past: Prefix,
    tokens: Vec<u32>, // the tokens whose keys and values are in `past`
}

impl<'a> Session<'a> {
    /// Creates an empty session.
    pub fn new(model: &'a Decoder) -> Session<'a> {
        Session { model, past: Prefix::default(), tokens: Vec::new() }
    }

    /// Generates a continuation of `prompt`. `stop(ids)` is called after every new token and ends generation by
    /// returning true.
    ///
    /// For sampling, the index of the prompt is `options.first_prompt`.
    ///
    /// # Errors
    /// Returns the errors of [`generate`](crate::generate); the session remains usable.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions<'_>,
        stop: &mut dyn FnMut(&[u32]) -> bool,
    ) -> Result<Generation, ModelError> {
        options.decoding.validate()?;
        if prompt.is_empty() {
            return Err(ModelError::EmptySequence { index: 0 });
        }
        // With a shorter sliding window, tokens could not attend to a past that is stored separately.
        let share = self.model.may_share(prompt.len() + options.max_new_tokens);
        // The last token is always computed, because its logits are needed.
        let shared = if share { common(&self.tokens, prompt).min(prompt.len() - 1) } else { 0 };
        self.past.truncate(shared);
        self.tokens.truncate(shared);
        let keep = if share { prompt.len() } else { 0 };
        let batches = [Batch { sequences: vec![0], past: shared }];
        let limits = [options.max_new_tokens];
        let texts = Texts { prompts: &[prompt], limits: &limits, batches: &batches, room: Batching::default().room() };
        let mut one = One { stop, generation: Generation::default() };
        self.past = generate_all(self.model, &texts, options, Ends { past: &self.past, keep }, &mut one)?;
        self.tokens = prompt[..keep].to_vec();
        Ok(one.generation)
    }
}

/// Receives the result for the only prompt.
struct One<'a> {
    stop: &'a mut dyn FnMut(&[u32]) -> bool,
    generation: Generation,
}

impl Receiver for One<'_> {
    type Error = ModelError;

    fn stop(&mut self, _index: usize, ids: &[u32]) -> bool {
        (self.stop)(ids)
    }

    fn done(&mut self, _index: usize, generation: Generation) -> Result<(), ModelError> {
        self.generation = generation;
        Ok(())
    }
}
