//! Requests to a model, and its responses.

use serde::{Deserialize, Serialize};

/// Any error returned by a model.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request for the log-likelihood of `continuation` given `context`.
///
/// Tokenized as in lm-eval: white space at the end of the context moves to the continuation; context and continuation
/// are tokenized together, and the continuation's tokens are those that follow the number of tokens that the context
/// alone has; a text that is too long is truncated on the left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoglikelihoodRequest {
    /// The text before the continuation.
    pub context: String,
    /// The text that is scored.
    pub continuation: String,
}

/// An answer to a [`LoglikelihoodRequest`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loglikelihood {
    /// Sum of natural log-probabilities of the continuation's tokens.
    #[serde(with = "crate::request::number")]
    pub sum: f64,
    /// Whether greedy decoding would produce the continuation, i.e. each of its tokens is the most likely one.
    pub greedy: bool,
    /// Number of the continuation's tokens.
    pub tokens: usize,
}

/// A request for the continuation of `prompt` by greedy decoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The text to continue.
    pub prompt: String,
    /// Maximum number of new tokens.
    pub max_new_tokens: usize,
    /// Stop sequences: the continuation is truncated before the first one that occurs.
    pub stop: Vec<String>,
}

/// The request to the model for a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Generate a text.
    Generate(GenerateRequest),
    /// Score each of several continuations.
    Loglikelihood(Vec<LoglikelihoodRequest>),
    /// Score one continuation, and say whether greedy decoding would produce it.
    Continuation(LoglikelihoodRequest),
}

/// The model's answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The generated text.
    Text(String),
    /// Sum of log-probabilities of each continuation. In JSON, values that are not finite are the strings `"inf"`,
    /// `"-inf"` and `"NaN"`.
    Loglikelihoods(#[serde(with = "numbers")] Vec<f64>),
    /// The answer to a [`Request::Continuation`].
    Continuation(Loglikelihood),
}

/// Callback that receives the answer to the request with a given index. If it returns an error, the model must return
/// that error immediately.
pub type Answered<'a, T> = &'a mut dyn FnMut(usize, T) -> Result<(), BoxError>;

/// A model that answers requests. The implementation chooses batches and order, and calls `answered` with each answer
/// and the index of its request as soon as the answer is available, so that completed work is kept if the process is
/// killed.
pub trait LanguageModel {
    /// Computes log-likelihoods. Each request is answered once.
    ///
    /// # Errors
    /// Returns an error if the model fails or `answered` returns one.
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError>;

    /// Generates texts. Each request is answered once.
    ///
    /// # Errors
    /// Returns an error if the model fails or `answered` returns one.
    fn generate(&mut self, requests: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError>;

    /// Returns an identifier of the model, such as a hash of its weights and settings. It is saved with each
    /// prediction, so that answers of one model are never used for another. Models without a fingerprint cannot be told
    /// apart.
    fn fingerprint(&self) -> Option<String> {
        None
    }
}

/// Serializes values that JSON lacks: serde_json would write infinities as `null`, and could not read them again.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Finite(f64),
    Other(String),
}

impl From<f64> for Number {
    fn from(v: f64) -> Number {
        if v.is_finite() { Number::Finite(v) } else { Number::Other(v.to_string()) }
    }
}

impl Number {
    fn value<E: serde::de::Error>(self) -> Result<f64, E> {
        match self {
            Number::Finite(v) => Ok(v),
            Number::Other(text) => text.parse().map_err(E::custom),
        }
    }
}

/// Serialization of a single number.
mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Number;

    pub(super) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        Number::from(*value).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Number::deserialize(from)?.value()
    }
}

/// Serialization of a list of numbers.
mod numbers {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Number;

    pub(super) fn serialize<S: Serializer>(values: &[f64], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|v| Number::from(*v)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
        Vec::<Number>::deserialize(from)?.into_iter().map(Number::value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_come_back_from_json_bit_for_bit() {
        let values = vec![-0.1 - 0.2, f64::MIN_POSITIVE, -1e300, f64::NEG_INFINITY, f64::INFINITY, f64::NAN, -3.0];
        let json = serde_json::to_string(&Response::Loglikelihoods(values.clone())).unwrap();
        let Response::Loglikelihoods(back) = serde_json::from_str(&json).unwrap() else { panic!("{json}") };
        let bits = |v: &[f64]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&back), bits(&values), "{json}");
        let text = Response::Text("\u{0}\u{2028}𝄞\n".to_owned());
        assert_eq!(serde_json::from_str::<Response>(&serde_json::to_string(&text).unwrap()).unwrap(), text);
    }
}
