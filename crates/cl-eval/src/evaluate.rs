use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{BoxError, Error, GenerateRequest, LanguageModel, LoglikelihoodRequest, Request, Response, Task};

/// One answered document, as a line of a predictions file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Index of the document.
    pub document: usize,
    /// blake3 of the request: prompt, most tokens, stop texts. An answer is found again by it.
    pub request: String,
    /// Fingerprint of the model, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
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
    /// Mean of each metric, in `[0, 1]`.
    pub metrics: BTreeMap<String, f64>,
}

impl Scores {
    /// Mean of the main metric.
    pub fn main(&self) -> f64 {
        self.metrics.get(&self.main_metric).copied().unwrap_or(f64::NAN)
    }
}

/// Requests that are asked before anything is written down: a kill loses at most as many answers.
const CHUNK: usize = 64;

/// Asks the model about every document that `predictions` (a JSONL file of [`Prediction`]) does not answer yet, writes the
/// answers down as they come, and scores. `observe(done, all)` is called after every chunk.
///
/// Answers are found again by their requests, so a killed run goes on where it was, documents may have been added or put in
/// another order, and a document that comes twice is asked about once. A line cut off by a kill is asked about again. Answers
/// to requests that the task does not make (a run with a larger limit left them) stay behind those of the task and count for
/// nothing. When all is done the file is in the order of the documents, the same as that of an uninterrupted run.
///
/// # Errors
/// [`Error::NoDocuments`], [`Error::Model`], [`Error::Answers`], [`Error::Io`], [`Error::OtherModel`] when the file holds
/// another model's answers, [`Error::NotPredictions`] when it is another kind of file; it is then left as it is.
pub fn evaluate(
    task: &dyn Task,
    model: &mut dyn LanguageModel,
    predictions: &Path,
    observe: &mut dyn FnMut(usize, usize),
) -> Result<Scores, Error> {
    if task.is_empty() {
        return Err(Error::NoDocuments { name: task.name().to_owned() });
    }
    let fingerprint = model.fingerprint();
    let requests: Vec<Request> = (0..task.len()).map(|d| task.request(d)).collect();
    let keys: Vec<String> = requests.iter().map(key).collect();
    let mut saved = Saved::read(predictions)?;
    saved.check_model(predictions, fingerprint.as_deref())?;
    // Without a cut-off line at its end, and in a directory that exists.
    write_whole(predictions, &saved.lines)?;

    let io = |source| Error::Io { path: predictions.to_owned(), source };
    let mut file = OpenOptions::new().append(true).open(predictions).map_err(io)?;
    let open = saved.first_unanswered(&keys);
    let done = |saved: &Saved| keys.iter().filter(|k| saved.by_request.contains_key(*k)).count();
    observe(done(&saved), task.len());
    for chunk in open.chunks(CHUNK) {
        let asked: Vec<&Request> = chunk.iter().map(|&d| &requests[d]).collect();
        let responses = ask(task, model, &asked)?;
        let from = saved.lines.len();
        for (&document, response) in chunk.iter().zip(responses) {
            let scores = task.score(document, &response);
            let (request, model) = (keys[document].clone(), fingerprint.clone());
            saved.push(Prediction { document, request, model, response, scores });
        }
        file.write_all(&to_jsonl(&saved.lines[from..]).map_err(io)?).map_err(io)?;
        observe(done(&saved), task.len());
    }
    drop(file);
    let answered = saved.score(task, &keys, predictions)?;
    write_whole(predictions, &saved.in_order(&keys, &answered))?;
    Ok(aggregate(task, &answered))
}

/// Scores a predictions file again, without a model.
///
/// # Errors
/// [`Error::Io`], [`Error::NoDocuments`], [`Error::NotPredictions`], [`Error::Unanswered`].
pub fn rescore(task: &dyn Task, predictions: &Path) -> Result<Scores, Error> {
    if task.is_empty() {
        return Err(Error::NoDocuments { name: task.name().to_owned() });
    }
    let keys: Vec<String> = (0..task.len()).map(|d| key(&task.request(d))).collect();
    let answered = Saved::read(predictions)?.score(task, &keys, predictions)?;
    Ok(aggregate(task, &answered))
}

/// A predictions file.
#[derive(Default)]
struct Saved {
    lines: Vec<Prediction>,
    /// Line of each request's answer; the first one if there are several.
    by_request: HashMap<String, usize>,
}

impl Saved {
    /// The lines of a file; no file is no lines. What a kill cut off, wherever it was cut, is left out; anything else that is no
    /// prediction is an error, so that no other file is ever written over.
    fn read(path: &Path) -> Result<Saved, Error> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Saved::default()),
            Err(source) => {
                return Err(Error::Io { path: path.to_owned(), source });
            }
        };
        let mut saved = Saved::default();
        for (i, line) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
            match serde_json::from_slice(line) {
                Ok(prediction) => saved.push(prediction),
                Err(_) if is_cut_off(line) => {}
                Err(source) => {
                    return Err(Error::NotPredictions { path: path.to_owned(), line: i + 1, source });
                }
            }
        }
        Ok(saved)
    }

    fn push(&mut self, prediction: Prediction) {
        self.by_request.entry(prediction.request.clone()).or_insert(self.lines.len());
        self.lines.push(prediction);
    }

    /// Answers that name no model are taken as they are: the model that gave them had no fingerprint.
    fn check_model(&self, path: &Path, model: Option<&str>) -> Result<(), Error> {
        let Some(expected) = model else { return Ok(()) };
        let other = self.lines.iter().filter_map(|p| p.model.as_deref()).find(|m| *m != expected);
        other.map_or(Ok(()), |found| {
            Err(Error::OtherModel { path: path.to_owned(), found: found.to_owned(), expected: expected.to_owned() })
        })
    }

    /// Documents to ask about, one for each request that has no answer.
    fn first_unanswered(&self, keys: &[String]) -> Vec<usize> {
        let mut seen = HashSet::new();
        (0..keys.len()).filter(|&d| !self.by_request.contains_key(&keys[d]) && seen.insert(&keys[d])).collect()
    }

    /// One prediction a document, scored as the task scores now.
    fn score(&self, task: &dyn Task, keys: &[String], path: &Path) -> Result<Vec<Prediction>, Error> {
        let one = |(document, key): (usize, &String)| {
            let line = self.by_request.get(key).ok_or_else(|| Error::Unanswered {
                path: path.to_owned(),
                task: task.name().to_owned(),
                document,
                documents: keys.len(),
            })?;
            let saved = &self.lines[*line];
            let scores = task.score(document, &saved.response);
            Ok(Prediction { document, scores, ..saved.clone() })
        };
        keys.iter().enumerate().map(one).collect()
    }

    /// The task's answers in the order of its documents, then those that are none of its.
    fn in_order(&self, keys: &[String], answered: &[Prediction]) -> Vec<Prediction> {
        let of_task: HashSet<&String> = keys.iter().collect();
        let others = self.lines.iter().filter(|p| !of_task.contains(&p.request));
        answered.iter().chain(others).cloned().collect()
    }
}

/// Whether a line is the beginning of a prediction, without its end.
fn is_cut_off(line: &[u8]) -> bool {
    const START: &[u8] = br#"{"document":"#;
    !line.ends_with(b"\n") && (line.starts_with(START) || START.starts_with(line))
}

/// One response a request, in their order.
fn ask(task: &dyn Task, model: &mut dyn LanguageModel, requests: &[&Request]) -> Result<Vec<Response>, Error> {
    let mut generate: Vec<GenerateRequest> = Vec::new();
    let mut score: Vec<LoglikelihoodRequest> = Vec::new();
    for request in requests {
        match request {
            Request::Generate(r) => generate.push(r.clone()),
            Request::Loglikelihood(list) => score.extend(list.iter().cloned()),
        }
    }
    let name = || task.name().to_owned();
    let failed = |e: BoxError| Error::Model { task: name(), message: with_causes(e.as_ref()) };
    let texts = if generate.is_empty() { Vec::new() } else { model.generate(&generate).map_err(failed)? };
    let sums = if score.is_empty() { Vec::new() } else { model.loglikelihood(&score).map_err(failed)? };
    for (asked, got) in [(generate.len(), texts.len()), (score.len(), sums.len())] {
        if asked != got {
            return Err(Error::Answers { task: name(), asked, got });
        }
    }
    let (mut texts, mut sums) = (texts.into_iter(), sums.into_iter().map(|l| l.sum));
    let response = |request: &&Request| match request {
        Request::Generate(_) => Response::Text(texts.next().unwrap_or_default()),
        Request::Loglikelihood(list) => Response::Loglikelihoods(sums.by_ref().take(list.len()).collect()),
    };
    Ok(requests.iter().map(response).collect())
}

fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let text = e.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = e.source();
    }
    message
}

fn aggregate(task: &dyn Task, predictions: &[Prediction]) -> Scores {
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for prediction in predictions {
        for (metric, value) in &prediction.scores {
            values.entry(metric.clone()).or_default().push(*value);
        }
    }
    let mean = |mut values: Vec<f64>| {
        // Sorted, so that the mean's last bits do not depend on the order of the documents.
        values.sort_by(f64::total_cmp);
        values.iter().sum::<f64>() / predictions.len() as f64
    };
    let metrics = values.into_iter().map(|(metric, values)| (metric, mean(values))).collect();
    let (task, main_metric) = (task.name().to_owned(), task.main_metric().to_owned());
    Scores { task, documents: predictions.len(), main_metric, metrics }
}

fn to_jsonl(predictions: &[Prediction]) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for prediction in predictions {
        serde_json::to_writer(&mut text, prediction)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Through a file beside it, so that a kill leaves the old one or the new one.
fn write_whole(path: &Path, predictions: &[Prediction]) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    let part = path.with_extension("jsonl.part");
    let mut file = File::create(&part).map_err(io)?;
    file.write_all(&to_jsonl(predictions).map_err(io)?).map_err(io)?;
    file.sync_all().map_err(io)?;
    std::fs::rename(&part, path).map_err(io)
}

/// Half of a blake3 hash is enough: 128 bits.
fn key(request: &Request) -> String {
    let json = serde_json::to_vec(request).expect("texts and numbers always serialize");
    blake3::hash(&json).to_hex()[..32].to_owned()
}
