/// Whatever went wrong in a model.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How likely is `continuation` after `context`?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoglikelihoodRequest {
    /// What stands before.
    pub context: String,
    /// What is scored.
    pub continuation: String,
}

/// An answer to a [`LoglikelihoodRequest`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loglikelihood {
    /// Sum of natural log-probabilities of the continuation's tokens.
    pub sum: f64,
    /// Every token was the likeliest one.
    pub greedy: bool,
    /// Number of the continuation's tokens.
    pub tokens: usize,
}

/// What does the model write after `prompt`, always taking the likeliest token?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerateRequest {
    /// What stands before.
    pub prompt: String,
    /// Most tokens to write.
    pub max_new_tokens: usize,
    /// Texts that end the answer; the first one to come up and all after it are cut off.
    pub stop: Vec<String>,
}

/// Something that answers requests. It chooses batches by itself; answers come in the order of the requests.
pub trait LanguageModel {
    /// Scores continuations.
    ///
    /// # Errors
    /// The model's own.
    fn loglikelihood(&mut self, requests: &[LoglikelihoodRequest]) -> Result<Vec<Loglikelihood>, BoxError>;

    /// Writes continuations.
    ///
    /// # Errors
    /// The model's own.
    fn generate(&mut self, requests: &[GenerateRequest]) -> Result<Vec<String>, BoxError>;
}
