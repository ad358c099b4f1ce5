use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{GenerateRequest, LoglikelihoodRequest, Metric};

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

/// What an answer is held against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// One of several continuations is right.
    Choice {
        /// The continuations as they are counted for `acc_norm`, without the space in front.
        choices: Vec<String>,
        /// Index of the right one.
        gold: usize,
    },
    /// What should have been written.
    Reference {
        /// The text.
        reference: String,
        /// What SARI compares the answer with.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<String>,
    },
}

/// Whose script a task's published scores come from. In the paper the two differ in more than prompts: TRACE's tasks are
/// tokenized as training does, BOS included; those of lm-evaluation-harness without BOS, which was its default then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Harness {
    /// lm-evaluation-harness.
    LmEval,
    /// TRACE.
    Trace,
    /// Neither.
    #[default]
    Other,
}

/// Documents with a way to ask about each and to score the answer.
pub trait Task: Sync {
    /// Name, as in tables.
    fn name(&self) -> &str;

    /// Number of documents.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What to ask about a document (from 0, below [`Task::len`]).
    fn request(&self, document: usize) -> Request;

    /// What its answer is held against.
    fn target(&self, document: usize) -> Target;

    /// How answers are scored.
    fn metric(&self) -> Metric;

    /// Whose script its published scores come from.
    fn harness(&self) -> Harness {
        Harness::Other
    }

    /// How its documents were asked about, as it is recorded with results: shots, seed, files and their hashes.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
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
pub(crate) mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Number;

    pub(crate) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        Number::from(*value).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
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
