//! What a model is asked and what it answers.

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
    #[serde(with = "crate::request::number")]
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

/// What a document asks of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// To write.
    Generate(GenerateRequest),
    /// To score each of several continuations.
    Loglikelihood(Vec<LoglikelihoodRequest>),
}

/// What the model answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// What it wrote.
    Text(String),
    /// Sums of log-probabilities, one a continuation. In JSON those that are not finite are the texts `"inf"`, `"-inf"` and
    /// `"NaN"`.
    Loglikelihoods(#[serde(with = "numbers")] Vec<f64>),
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

/// JSON has no infinities: serde_json would write `null` and not read it again.
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

/// One number.
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

/// Several numbers.
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
