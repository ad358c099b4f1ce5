use serde::{Deserialize, Serialize};

/// Whatever went wrong in a model.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How likely is `continuation` after `context`?
///
/// As in lm-eval: white space at the end of the context belongs to the continuation; the continuation's tokens are those of
/// the whole text beyond as many as the context alone has; what is too long loses tokens on its left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoglikelihoodRequest {
    /// What stands before.
    pub context: String,
    /// What is scored.
    pub continuation: String,
}

/// An answer to a [`LoglikelihoodRequest`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loglikelihood {
    /// Sum of natural log-probabilities of the continuation's tokens.
    #[serde(with = "crate::task::number")]
    pub sum: f64,
    /// Every token was the likeliest one.
    pub greedy: bool,
    /// Number of the continuation's tokens.
    pub tokens: usize,
}

/// What does the model write after `prompt`, always taking the likeliest token?
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GenerateRequest {
    /// What stands before.
    pub prompt: String,
    /// Most tokens to write.
    pub max_new_tokens: usize,
    /// Texts that end the answer; the first one to come up and all after it are cut off.
    pub stop: Vec<String>,
}

/// Takes the answer to the request of an index. Its error is to be handed on at once, as the model's own.
pub type Answered<'a, T> = &'a mut dyn FnMut(usize, T) -> Result<(), BoxError>;

/// Something that answers requests. It chooses batches and order by itself, and hands every answer over as soon as it is
/// known, with the index of its request, so that what is finished survives a kill.
pub trait LanguageModel {
    /// Scores continuations, each request once.
    ///
    /// # Errors
    /// The model's own, and those of `answered`.
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError>;

    /// Writes continuations, each request once.
    ///
    /// # Errors
    /// The model's own, and those of `answered`.
    fn generate(&mut self, requests: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError>;

    /// What tells this model from others, such as a hash of its weights and settings. Kept beside each prediction, so that
    /// another model's answers are never taken for its own; without one they cannot be told apart.
    fn fingerprint(&self) -> Option<String> {
        None
    }
}
