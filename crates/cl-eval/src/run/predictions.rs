use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use cl_data::read_lines;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::metrics::{Metric, Target};
use crate::request::Response;

/// An answered document, one line of a predictions file. It contains everything that its scores are computed from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Index of the document.
    pub document: usize,
    /// Name of the task.
    pub task: String,
    /// The metric used to score the answer.
    pub metric: Metric,
    /// blake3 hash of the request, used to match saved answers.
    pub request: String,
    /// Fingerprint of the model, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The model's answer.
    pub response: Response,
    /// The target used to score the answer.
    pub target: Target,
    /// Scores by name.
    pub scores: BTreeMap<String, f64>,
    /// Whether the last completed evaluation did not ask for this answer, for example because of a smaller limit or
    /// another prompt. It is kept for later evaluations, and not scored.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unscored: bool,
}

/// Content of a predictions file.
#[derive(Default)]
pub(super) struct Saved {
    pub(super) lines: Vec<Prediction>,
    /// For each request, the index of the first line that answers it.
    pub(super) by_request: HashMap<String, usize>,
    /// Size of the complete lines in bytes.
    pub(super) whole: u64,
    /// Whether the last line is complete except for its newline.
    pub(super) unended: bool,
}

impl Saved {
    /// Reads a file; a missing file has no lines. An incomplete last line is ignored. Returns an error if any other
    /// line is not a prediction, so that no unrelated file is ever overwritten.
    pub(super) fn read(path: &Path) -> Result<Saved, Error> {
        let mut saved = Saved::default();
        if !path.exists() {
            return Ok(saved);
        }
        for line in read_lines(path)? {
            let line = line?;
            match serde_json::from_slice(&line.bytes) {
                Ok(prediction) => saved.push(prediction),
                // A file of nothing else is not one of predictions.
                Err(_) if line.bytes.trim_ascii().is_empty() && !saved.lines.is_empty() => {}
                Err(_) if is_cut_off(&line.bytes) => break,
                Err(source) => {
                    return Err(Error::NotPredictions { path: path.to_owned(), line: line.number, source });
                }
            }
            saved.whole += line.bytes.len() as u64;
            saved.unended = !line.bytes.ends_with(b"\n");
        }
        Ok(saved)
    }

    /// Number of answered documents.
    pub(super) fn done(&self, keys: &[String]) -> usize {
        keys.iter().filter(|k| self.by_request.contains_key(*k)).count()
    }

    pub(super) fn push(&mut self, prediction: Prediction) {
        self.by_request.entry(prediction.request.clone()).or_insert(self.lines.len());
        self.lines.push(prediction);
    }

    /// Returns an error if an answer is from another model. Answers without a fingerprint are accepted: their model had
    /// none.
    pub(super) fn check_model(&self, path: &Path, model: Option<&str>) -> Result<(), Error> {
        let Some(expected) = model else { return Ok(()) };
        let other = self.lines.iter().filter_map(|p| p.model.as_deref()).find(|m| *m != expected);
        other.map_or(Ok(()), |found| {
            Err(Error::OtherModel { path: path.to_owned(), found: found.to_owned(), expected: expected.to_owned() })
        })
    }

    /// Returns, for each unanswered request, its first document.
    pub(super) fn first_unanswered(&self, keys: &[String]) -> Vec<usize> {
        let mut seen = HashSet::new();
        (0..keys.len()).filter(|&d| !self.by_request.contains_key(&keys[d]) && seen.insert(&keys[d])).collect()
    }

    /// Returns the task's answers in the order of its documents, then answers to other requests.
    pub(super) fn in_order(&self, keys: &[String], answered: &[Prediction]) -> Vec<Prediction> {
        let of_task: HashSet<&String> = keys.iter().collect();
        let others = self.lines.iter().filter(|p| !of_task.contains(&p.request));
        let others = others.map(|p| Prediction { unscored: true, ..p.clone() });
        answered.iter().cloned().chain(others).collect()
    }
}

/// Whether a line is an incomplete prediction.
fn is_cut_off(line: &[u8]) -> bool {
    const START: &[u8] = br#"{"document":"#;
    !line.ends_with(b"\n") && (line.starts_with(START) || START.starts_with(line))
}

pub(super) fn to_jsonl(predictions: &[Prediction]) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for prediction in predictions {
        serde_json::to_writer(&mut text, prediction)?;
        text.push(b'\n');
    }
    Ok(text)
}
