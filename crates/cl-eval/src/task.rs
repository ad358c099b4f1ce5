use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{GenerateRequest, LoglikelihoodRequest};

/// What a document asks of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Sums of log-probabilities, one a continuation.
    Loglikelihoods(Vec<f64>),
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

    /// What to ask about a document.
    fn request(&self, document: usize) -> Request;

    /// Scores of an answer, each in `[0, 1]`, by metric.
    fn score(&self, document: usize, response: &Response) -> BTreeMap<String, f64>;

    /// The metric that stands for the task in tables.
    fn main_metric(&self) -> &str;
}
