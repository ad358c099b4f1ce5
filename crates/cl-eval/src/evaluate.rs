use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{BoxError, Error, LanguageModel, Request, Response, Task};

/// One answered document, as a line of a predictions file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Index of the document.
    pub document: usize,
    /// blake3 of the request, so that a file of another task, prompt or limit is noticed.
    pub request: String,
    /// What the model answered.
    pub response: Response,
    /// Its scores by metric.
    pub scores: BTreeMap<String, f64>,
}

/// Means over all documents of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Name of the task.
    pub task: String,
    /// Number of documents.
    pub documents: usize,
    /// The metric that stands for the task.
    pub main_metric: String,
    /// Mean of each metric.
    pub metrics: BTreeMap<String, f64>,
}

impl Scores {
    /// Mean of the main metric.
    pub fn main(&self) -> f64 {
        self.metrics.get(&self.main_metric).copied().unwrap_or(f64::NAN)
    }
}

/// Documents that are asked about before anything is written down: a kill loses at most as many answers.
const CHUNK: usize = 64;

/// Asks the model about every document that `predictions` (a JSONL file) does not answer yet, writes the answers down as
/// they come, and scores. `observe(done, all)` is called after every chunk.
///
/// # Errors
/// [`Error::Model`], [`Error::Io`], [`Error::Predictions`] when the file belongs to other requests.
pub fn evaluate(
    task: &dyn Task,
    model: &mut dyn LanguageModel,
    predictions: &Path,
    observe: &mut dyn FnMut(usize, usize),
) -> Result<Scores, Error> {
    if task.is_empty() {
        return Err(Error::NoDocuments { name: task.name().to_owned() });
    }
    let mut answered = read(task, predictions)?;
    rewrite(predictions, &answered)?;
    let io = |source| Error::Io { path: predictions.to_owned(), source };
    let mut file = OpenOptions::new().append(true).open(predictions).map_err(io)?;
    let open: Vec<usize> = (0..task.len()).filter(|d| !answered.contains_key(d)).collect();
    observe(answered.len(), task.len());
    for chunk in open.chunks(CHUNK) {
        let requests: Vec<Request> = chunk.iter().map(|&d| task.request(d)).collect();
        let responses = ask(model, &requests)
            .map_err(|e| Error::Model { task: task.name().to_owned(), message: e.to_string() })?;
        let mut lines = Vec::new();
        for ((&document, request), response) in chunk.iter().zip(&requests).zip(responses) {
            let scores = task.score(document, &response);
            let prediction = Prediction { document, request: key(request), response, scores };
            serde_json::to_writer(&mut lines, &prediction).map_err(|e| io(e.into()))?;
            lines.push(b'\n');
            answered.insert(document, prediction);
        }
        file.write_all(&lines).map_err(io)?;
        observe(answered.len(), task.len());
    }
    // In the order of the documents, so that a resumed run leaves the same file as an uninterrupted one.
    rewrite(predictions, &answered)?;
    Ok(aggregate(task, answered.values()))
}

/// Scores a predictions file again, without a model.
///
/// # Errors
/// [`Error::Io`], [`Error::Predictions`] when a document has no answer.
pub fn rescore(task: &dyn Task, predictions: &Path) -> Result<Scores, Error> {
    let mut answered = read(task, predictions)?;
    if let Some(document) = (0..task.len()).find(|d| !answered.contains_key(d)) {
        let message = format!("document {document} of {} has no answer", task.len());
        return Err(Error::Predictions { path: predictions.to_owned(), message });
    }
    for (document, prediction) in &mut answered {
        prediction.scores = task.score(*document, &prediction.response);
    }
    Ok(aggregate(task, answered.values()))
}

fn ask(model: &mut dyn LanguageModel, requests: &[Request]) -> Result<Vec<Response>, BoxError> {
    let mut generate = Vec::new();
    let mut score = Vec::new();
    for request in requests {
        match request {
            Request::Generate(r) => generate.push(r.clone()),
            Request::Loglikelihood(list) => score.extend(list.iter().cloned()),
        }
    }
    let mut texts = if generate.is_empty() { Vec::new() } else { model.generate(&generate)? }.into_iter();
    let mut sums = if score.is_empty() { Vec::new() } else { model.loglikelihood(&score)? }.into_iter();
    let short = || BoxError::from("the model gave fewer answers than it was asked for");
    requests
        .iter()
        .map(|request| match request {
            Request::Generate(_) => texts.next().map(Response::Text).ok_or_else(short),
            Request::Loglikelihood(list) => {
                let values: Vec<f64> = sums.by_ref().take(list.len()).map(|l| l.sum).collect();
                if values.len() == list.len() { Ok(Response::Loglikelihoods(values)) } else { Err(short()) }
            }
        })
        .collect()
}

fn aggregate<'p>(task: &dyn Task, predictions: impl Iterator<Item = &'p Prediction>) -> Scores {
    let mut sums: BTreeMap<String, f64> = BTreeMap::new();
    let mut documents = 0;
    for prediction in predictions {
        documents += 1;
        for (metric, value) in &prediction.scores {
            *sums.entry(metric.clone()).or_insert(0.0) += value;
        }
    }
    sums.values_mut().for_each(|s| *s /= f64::from(documents));
    let (task, main_metric) = (task.name().to_owned(), task.main_metric().to_owned());
    Scores { task, documents: documents as usize, main_metric, metrics: sums }
}

/// Answers of the file by document; a last line that a kill cut off is left out.
fn read(task: &dyn Task, path: &Path) -> Result<BTreeMap<usize, Prediction>, Error> {
    let mut answered = BTreeMap::new();
    if !path.exists() {
        return Ok(answered);
    }
    let io = |source| Error::Io { path: path.to_owned(), source };
    for line in BufReader::new(File::open(path).map_err(io)?).lines() {
        let Ok(prediction) = serde_json::from_str::<Prediction>(&line.map_err(io)?) else { continue };
        let document = prediction.document;
        if document >= task.len() || prediction.request != key(&task.request(document)) {
            let message = format!("document {document} was asked differently than task `{}` asks now", task.name());
            return Err(Error::Predictions { path: path.to_owned(), message });
        }
        answered.insert(document, prediction);
    }
    Ok(answered)
}

fn rewrite(path: &Path, answered: &BTreeMap<usize, Prediction>) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    for prediction in answered.values() {
        serde_json::to_writer(&mut text, prediction).map_err(|e| io(e.into()))?;
        text.push(b'\n');
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    let part = path.with_extension("jsonl.part");
    std::fs::write(&part, text).map_err(io)?;
    std::fs::rename(&part, path).map_err(io)
}

fn key(request: &Request) -> String {
    blake3::hash(format!("{request:?}").as_bytes()).to_hex()[..16].to_owned()
}
