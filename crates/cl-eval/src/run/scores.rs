use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::predictions::Prediction;
use crate::metrics::Metric;
use crate::request::Response;

/// Name of the perplexity in [`Scores`]: the only score that is better if lower, and no mean over documents.
pub(super) const PERPLEXITY: &str = "perplexity";

/// Mean scores over all documents of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Name of the task.
    pub task: String,
    /// Number of documents.
    pub documents: usize,
    /// The main metric, which represents the task in tables.
    pub main_metric: String,
    /// Mean of each metric, in `[0, 1]`; for [`Metric::GreedyMatch`] also `perplexity`, at least 1, unless it is infinite.
    pub metrics: BTreeMap<String, f64>,
    /// Standard error of each mean: the sample standard deviation divided by the square root of the number of
    /// documents; absent for a single document, and in files written by older versions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub stderr: BTreeMap<String, f64>,
}

impl Scores {
    /// Returns the mean of the main metric.
    pub fn main(&self) -> f64 {
        self.metrics.get(&self.main_metric).copied().unwrap_or(f64::NAN)
    }

    /// Computes the mean scores of a task's predictions, which may be in any order.
    pub fn of(task: &str, metric: Metric, predictions: &[Prediction]) -> Scores {
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for prediction in predictions {
            for (metric, value) in &prediction.scores {
                values.entry(metric.clone()).or_default().push(*value);
            }
        }
        // Sorted, so that the mean's last bits do not depend on the order of the documents.
        values.values_mut().for_each(|v| v.sort_by(f64::total_cmp));
        let mut metrics: BTreeMap<_, _> = values.iter().map(|(metric, v)| (metric.clone(), mean(v))).collect();
        let mut stderr: BTreeMap<_, _> = values.iter().map(|(metric, v)| (metric.clone(), standard_error(v))).collect();
        // JSON has no infinity, so an infinite perplexity is left out.
        if let Some((perplexity, error)) = perplexity(predictions).filter(|(p, _)| p.is_finite()) {
            metrics.insert(PERPLEXITY.to_owned(), perplexity);
            stderr.insert(PERPLEXITY.to_owned(), error);
        }
        stderr.retain(|_, e| e.is_finite()); // JSON has no NaN, and NaN is not equal to itself
        let main_metric = predictions.first().map_or_else(|| metric.main().to_owned(), |p| metric.main_of(&p.target));
        let task = task.to_owned();
        Scores { task, documents: predictions.len(), main_metric, metrics, stderr }
    }
}

/// Returns exp(−mean log-likelihood) of the continuations, and its standard error to first order: the perplexity times
/// the standard error of the mean. `None` if the predictions are of another kind.
fn perplexity(predictions: &[Prediction]) -> Option<(f64, f64)> {
    let sum = |p: &Prediction| match p.response {
        Response::Continuation(answer) => Some(answer.sum),
        _ => None,
    };
    let mut sums: Vec<f64> = predictions.iter().map(sum).collect::<Option<_>>()?;
    sums.sort_by(f64::total_cmp);
    let perplexity = (-mean(&sums)).exp();
    Some((perplexity, perplexity * standard_error(&sums)))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of the mean with Bessel's correction, as in lm-eval.
fn standard_error(values: &[f64]) -> f64 {
    let (n, mean) = (values.len() as f64, mean(values));
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / (n - 1.0) / n).sqrt()
}
