use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::write_file;
use cl_data::read_lines;
use serde::{Deserialize, Serialize};

use crate::{BoxError, Error, LanguageModel, Loglikelihood, Metric, Request, Response, Target, Task};

/// One answered document, as a line of a predictions file. It says all that its scores are computed from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Index of the document.
    pub document: usize,
    /// Name of the task.
    pub task: String,
    /// How the answer is scored.
    pub metric: Metric,
    /// blake3 of the request: prompt, most tokens, stop texts. An answer is found again by it.
    pub request: String,
    /// Fingerprint of the model, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What the model answered.
    pub response: Response,
    /// What the answer is held against.
    pub target: Target,
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
    /// Standard error of each mean: the sample's standard deviation over the root of the number of documents. One
    /// document has none. Absent from files that older versions wrote.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub stderr: BTreeMap<String, f64>,
}

impl Scores {
    /// Mean of the main metric.
    pub fn main(&self) -> f64 {
        self.metrics.get(&self.main_metric).copied().unwrap_or(f64::NAN)
    }

    /// Means of the scores that predictions of one task hold, the documents in any order.
    pub fn of(task: &str, metric: Metric, predictions: &[Prediction]) -> Scores {
        aggregate(task, metric, predictions)
    }
}

/// A task to be asked, and the file (JSONL of [`Prediction`]) that its answers go to.
pub struct Open<'a> {
    /// The task.
    pub task: &'a dyn Task,
    /// The file; two tasks cannot share one.
    pub predictions: PathBuf,
}

/// [`evaluate_all`] of one task. `observe(done, all)` is called before the first and after every answer.
///
/// # Errors
/// As [`evaluate_all`].
pub fn evaluate(
    task: &dyn Task,
    model: &mut dyn LanguageModel,
    predictions: &Path,
    observe: &mut dyn FnMut(usize, usize),
) -> Result<Scores, Error> {
    let open = [Open { task, predictions: predictions.to_owned() }];
    let mut scores = evaluate_all(&open, model, &mut |_, done, all| observe(done, all))?;
    Ok(scores.remove(0))
}

/// Asks the model about every document that its task's file does not answer yet, all tasks together so that it can batch them
/// as it likes, writes every answer down as it comes, and scores. `observe(task, done, all)` is called with the task's index.
///
/// Answers are found again by their requests, so a killed run goes on where it was, documents may have been added or put in
/// another order, and a document that comes twice is asked about once. A line cut off by a kill is asked about again. Answers
/// to requests that the task does not make (a run with a larger limit left them) stay behind those of the task and count for
/// nothing. When all is done the file is in the order of the documents, as that of an uninterrupted run; log-likelihoods may
/// differ in the last bits that a model's batches decide.
///
/// Every file is locked as long as answers are added to it. Several processes may write to one directory, each its own files.
///
/// # Errors
/// [`Error::NoDocuments`], [`Error::Model`], [`Error::Answers`], [`Error::Io`], [`Error::OtherModel`] when the file holds
/// another model's answers, [`Error::NotPredictions`] when it is another kind of file; it is then left as it is.
/// [`Error::Busy`] when another process is adding to it. [`Error::File`], also for what is no regular file.
pub fn evaluate_all(
    open: &[Open<'_>],
    model: &mut dyn LanguageModel,
    observe: &mut dyn FnMut(usize, usize, usize),
) -> Result<Vec<Scores>, Error> {
    let fingerprint = model.fingerprint();
    let mut runs = open.iter().map(|o| Run::start(o, fingerprint.as_deref())).collect::<Result<Vec<_>, _>>()?;
    for (index, run) in runs.iter_mut().enumerate() {
        run.begin()?;
        observe(index, run.done, run.task.len());
    }
    let mut written = Asked::default();
    let mut scored = Asked::default();
    for (index, run) in runs.iter().enumerate() {
        for document in run.saved.first_unanswered(&run.keys) {
            match &run.requests[document] {
                Request::Generate(r) => written.push((index, document), std::slice::from_ref(r)),
                Request::Loglikelihood(list) => scored.push((index, document), list),
            }
        }
    }
    written.ask(
        &mut runs,
        observe,
        |requests, answered| model.generate(requests, answered),
        |texts| Response::Text(texts.into_iter().next().unwrap_or_default()),
    )?;
    scored.ask(
        &mut runs,
        observe,
        |requests, answered| model.loglikelihood(requests, answered),
        |sums| Response::Loglikelihoods(sums.into_iter().map(|l: Loglikelihood| l.sum).collect()),
    )?;
    runs.iter_mut().map(Run::finish).collect()
}

/// Scores a predictions file again by the task as it is now, without a model.
///
/// # Errors
/// [`Error::Io`], [`Error::NoDocuments`], [`Error::NotPredictions`], [`Error::Unanswered`].
pub fn rescore(task: &dyn Task, predictions: &Path) -> Result<Scores, Error> {
    let run = Run::start(&Open { task, predictions: predictions.to_owned() }, None)?;
    Ok(aggregate(task.name(), task.metric(), &run.answered()?))
}

/// Scores a predictions file again by what it says itself: neither model nor data are needed. Lines of several tasks are
/// scored task by task, in the order in which they first come up; a document that is answered twice counts once.
///
/// # Errors
/// [`Error::Io`], [`Error::NotPredictions`], [`Error::NoDocuments`] of a file without predictions.
pub fn score_file(predictions: &Path) -> Result<Vec<(Scores, Vec<Prediction>)>, Error> {
    cl_checkpoint::files::open_file(predictions)?;
    let mut tasks: Vec<(String, Vec<Prediction>)> = Vec::new();
    let mut seen = HashSet::new();
    for mut line in Saved::read(predictions)?.lines {
        if !seen.insert((line.task.clone(), line.document)) {
            continue;
        }
        line.scores = line.metric.scores(&line.target, &line.response);
        match tasks.iter_mut().find(|(name, _)| *name == line.task) {
            Some((_, lines)) => lines.push(line),
            None => tasks.push((line.task.clone(), vec![line])),
        }
    }
    if tasks.is_empty() {
        return Err(Error::NoDocuments { name: predictions.display().to_string() });
    }
    Ok(tasks.into_iter().map(|(task, lines)| (aggregate(&task, lines[0].metric, &lines), lines)).collect())
}

/// A task on its way: what it asks, and what is answered.
struct Run<'a> {
    task: &'a dyn Task,
    path: PathBuf,
    requests: Vec<Request>,
    keys: Vec<String>,
    askers: HashMap<String, usize>, // documents by key: one that comes twice is asked about once
    done: usize,
    fingerprint: Option<String>,
    saved: Saved,
    file: Option<File>,
}

impl<'a> Run<'a> {
    fn start(open: &Open<'a>, fingerprint: Option<&str>) -> Result<Run<'a>, Error> {
        let (task, path) = (open.task, open.predictions.clone());
        if task.is_empty() {
            return Err(Error::NoDocuments { name: task.name().to_owned() });
        }
        let requests: Vec<Request> = (0..task.len()).map(|d| task.request(d)).collect();
        let keys: Vec<String> = requests.iter().map(key).collect();
        let saved = Saved::read(&path)?;
        saved.check_model(&path, fingerprint)?;
        let mut askers = HashMap::new();
        keys.iter().for_each(|k| *askers.entry(k.clone()).or_insert(0) += 1);
        let done = saved.done(&keys);
        let fingerprint = fingerprint.map(str::to_owned);
        Ok(Run { task, path, requests, keys, askers, done, fingerprint, saved, file: None })
    }

    /// Opens the file to add to it, as the only one who does, without a cut-off line at its end; makes its directory.
    fn begin(&mut self) -> Result<(), Error> {
        make_parent(&self.path)?;
        let mut file = lock_log(&self.path)?;
        remove_leftovers(&self.path);
        // Another process may have added to it, or replaced it, since it was looked at.
        self.saved = Saved::read(&self.path)?;
        self.saved.check_model(&self.path, self.fingerprint.as_deref())?;
        self.done = self.saved.done(&self.keys);
        let end: &[u8] = if self.saved.unended { b"\n" } else { b"" };
        let io = |source| Error::Io { path: self.path.clone(), source };
        file.set_len(self.saved.whole).and_then(|()| file.write_all(end)).map_err(io)?;
        self.file = Some(file);
        Ok(())
    }

    fn answer(&mut self, document: usize, response: Response) -> Result<(), Error> {
        let (target, metric) = (self.task.target(document), self.task.metric());
        let scores = metric.scores(&target, &response);
        let (task, request, model) =
            (self.task.name().to_owned(), self.keys[document].clone(), self.fingerprint.clone());
        let prediction = Prediction { document, task, metric, request, model, response, target, scores };
        let io = |source| Error::Io { path: self.path.clone(), source };
        if let Some(file) = &mut self.file {
            file.write_all(&to_jsonl(std::slice::from_ref(&prediction)).map_err(io)?).map_err(io)?;
        }
        self.done += self.askers.get(&prediction.request).copied().unwrap_or(0);
        self.saved.push(prediction);
        Ok(())
    }

    /// One prediction a document, scored as the task scores now.
    fn answered(&self) -> Result<Vec<Prediction>, Error> {
        let (task, metric) = (self.task.name(), self.task.metric());
        let one = |(document, key): (usize, &String)| {
            let line = self.saved.by_request.get(key).ok_or_else(|| Error::Unanswered {
                path: self.path.clone(),
                task: task.to_owned(),
                document,
                documents: self.keys.len(),
            })?;
            let (saved, target) = (&self.saved.lines[*line], self.task.target(document));
            let scores = metric.scores(&target, &saved.response);
            Ok(Prediction { document, task: task.to_owned(), metric, target, scores, ..saved.clone() })
        };
        self.keys.iter().enumerate().map(one).collect()
    }

    fn finish(&mut self) -> Result<Scores, Error> {
        let answered = self.answered()?;
        let io = |source| Error::Io { path: self.path.clone(), source };
        write_whole(&self.path, &to_jsonl(&self.saved.in_order(&self.keys, &answered)).map_err(io)?)?;
        self.file = None;
        Ok(aggregate(self.task.name(), self.task.metric(), &answered))
    }
}

/// Requests of one kind with the documents that make them, and the answers so far.
struct Asked<R, A> {
    requests: Vec<R>,
    owners: Vec<usize>,                      // of each request, its place in `documents`
    documents: Vec<((usize, usize), usize)>, // (run, document) and the place of its first request
    answers: Vec<Option<A>>,
    open: Vec<usize>, // of each document, requests without an answer
}

impl<R, A> Default for Asked<R, A> {
    fn default() -> Self {
        Asked { requests: Vec::new(), owners: Vec::new(), documents: Vec::new(), answers: Vec::new(), open: Vec::new() }
    }
}

impl<R: Clone, A> Asked<R, A> {
    fn push(&mut self, document: (usize, usize), requests: &[R]) {
        let owner = self.documents.len();
        self.documents.push((document, self.requests.len()));
        self.open.push(requests.len());
        self.owners.extend(requests.iter().map(|_| owner));
        self.answers.extend(requests.iter().map(|_| None));
        self.requests.extend_from_slice(requests);
    }

    /// Every answer goes to its document, every document that is answered whole into its run's file.
    fn ask(
        mut self,
        runs: &mut [Run<'_>],
        observe: &mut dyn FnMut(usize, usize, usize),
        ask: impl FnOnce(&[R], &mut dyn FnMut(usize, A) -> Result<(), BoxError>) -> Result<(), BoxError>,
        response: impl Fn(Vec<A>) -> Response,
    ) -> Result<(), Error> {
        // A document that asks for nothing is answered by nothing.
        for owner in (0..self.documents.len()).filter(|&o| self.open[o] == 0) {
            let (run, document) = self.documents[owner].0;
            runs[run].answer(document, response(Vec::new()))?;
        }
        let Some(&((first, _), _)) = self.documents.first() else { return Ok(()) };
        if self.requests.is_empty() {
            return Ok(());
        }
        let (mut failure, mut got, asked) = (None, 0, self.requests.len());
        let requests = std::mem::take(&mut self.requests);
        let outcome = ask(&requests, &mut |index, answer| {
            got += 1;
            let Some(slot) = self.answers.get_mut(index).filter(|slot| slot.is_none()) else {
                return Err(format!("an answer to request {index} of {asked}, which has one or is none").into());
            };
            *slot = Some(answer);
            let owner = self.owners[index];
            self.open[owner] -= 1;
            if self.open[owner] > 0 {
                return Ok(());
            }
            let ((run, document), from) = self.documents[owner];
            let to = self.documents.get(owner + 1).map_or(asked, |(_, next)| *next);
            let answers = self.answers[from..to].iter_mut().filter_map(Option::take).collect();
            let written = runs[run].answer(document, response(answers));
            observe(run, runs[run].done, runs[run].task.len());
            written.map_err(|e| {
                let message = e.to_string();
                failure = Some(e);
                message.into()
            })
        });
        if let Some(error) = failure {
            return Err(error);
        }
        // Which of the tasks it was is not known once they are asked together; the first one that is still open.
        let open = self.open.iter().position(|&n| n > 0).map_or(first, |o| self.documents[o].0.0);
        let name = || runs[open].task.name().to_owned();
        outcome.map_err(|e| Error::Model { task: name(), message: with_causes(e.as_ref()) })?;
        if got != asked {
            return Err(Error::Answers { task: name(), asked, got });
        }
        Ok(())
    }
}

/// A predictions file.
#[derive(Default)]
struct Saved {
    lines: Vec<Prediction>,
    /// Line of each request's answer; the first one if there are several.
    by_request: HashMap<String, usize>,
    /// Bytes of the lines; less than the file's where a kill cut off the last one.
    whole: u64,
    /// The last line is whole but for its line feed.
    unended: bool,
}

impl Saved {
    /// The lines of a file; no file is no lines. What a kill cut off, wherever it was cut, is left out; anything else that is no
    /// prediction is an error, so that no other file is ever written over.
    fn read(path: &Path) -> Result<Saved, Error> {
        let mut saved = Saved::default();
        if !path.exists() {
            return Ok(saved);
        }
        for line in read_lines(path)? {
            let line = line?;
            match serde_json::from_slice(&line.bytes) {
                Ok(prediction) => saved.push(prediction),
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

    /// Documents that are answered.
    fn done(&self, keys: &[String]) -> usize {
        keys.iter().filter(|k| self.by_request.contains_key(*k)).count()
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

fn aggregate(task: &str, metric: Metric, predictions: &[Prediction]) -> Scores {
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for prediction in predictions {
        for (metric, value) in &prediction.scores {
            values.entry(metric.clone()).or_default().push(*value);
        }
    }
    // Sorted, so that the mean's last bits do not depend on the order of the documents.
    values.values_mut().for_each(|v| v.sort_by(f64::total_cmp));
    let metrics: BTreeMap<_, _> = values.iter().map(|(metric, v)| (metric.clone(), mean(v))).collect();
    let stderr = values.iter().map(|(metric, v)| (metric.clone(), standard_error(v)));
    let stderr = stderr.filter(|(_, e)| e.is_finite()).collect(); // JSON has no NaN, and equal scores are to be equal
    let (task, main_metric) = (task.to_owned(), metric.main().to_owned());
    Scores { task, documents: predictions.len(), main_metric, metrics, stderr }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// As lm-eval's: with Bessel's correction.
fn standard_error(values: &[f64]) -> f64 {
    let (n, mean) = (values.len() as f64, mean(values));
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / (n - 1.0) / n).sqrt()
}

fn to_jsonl(predictions: &[Prediction]) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for prediction in predictions {
        serde_json::to_writer(&mut text, prediction)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Writes a file, in a directory that is made for it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    make_parent(path)?;
    Ok(write_file(path, bytes)?)
}

fn make_parent(path: &Path) -> Result<(), Error> {
    let Some(parent) = path.parent() else { return Ok(()) };
    if let Some(file) = parent.ancestors().find(|p| p.exists()).filter(|p| !p.is_dir()) {
        return Err(Error::NoDirectory { path: file.to_owned(), file: path.to_owned() });
    }
    std::fs::create_dir_all(parent).map_err(|source| Error::Io { path: parent.to_owned(), source })
}

/// Opens a log of answers to add to it, and locks it as long as it is open.
fn lock_log(path: &Path) -> Result<File, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    loop {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path: path.to_owned() }),
            // A file system without locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        // Whoever had it before may have put another file in its place, which this lock does not guard.
        let same_file = |there: &Metadata, open: &Metadata| (there.dev(), there.ino()) == (open.dev(), open.ino());
        let open = file.metadata().map_err(io)?;
        if std::fs::metadata(path).is_ok_and(|there| same_file(&there, &open)) {
            return Ok(file);
        }
    }
}

/// Removes what kills left of writing a file whole: `.NAME.RANDOM.part` beside it. To be called under the file's lock.
fn remove_leftovers(path: &Path) {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return };
    let prefix = format!(".{}.", name.to_string_lossy());
    let random = |file: &str| {
        let middle = file.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".part"));
        middle.is_some_and(|m| !m.is_empty() && m.bytes().all(|b| b.is_ascii_alphanumeric()))
    };
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if random(&entry.file_name().to_string_lossy()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Half of a blake3 hash is enough: 128 bits.
fn key(request: &Request) -> String {
    let json = serde_json::to_vec(request).expect("texts and numbers always serialize");
    blake3::hash(&json).to_hex()[..32].to_owned()
}
