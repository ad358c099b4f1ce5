use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use cl_checkpoint::FileLock;

use super::files::{lock_log, make_parent, open_log, remove_leftovers, write_whole};
use super::predictions::{Prediction, Saved, to_jsonl};
use super::scores::Scores;
use crate::error::Error;
use crate::request::{BoxError, LanguageModel, Loglikelihood, Request, Response};
use crate::task::Task;

/// Default maximum number of tokens per forward pass.
pub const DEFAULT_BATCH_TOKENS: usize = 2048;

/// Default maximum number of sequences generated in parallel.
pub const DEFAULT_BATCH_SEQUENCES: usize = 32;

/// A task to evaluate, and the file for its answers (JSONL of [`Prediction`]).
pub struct Open<'a> {
    /// The task.
    pub task: &'a dyn Task,
    /// The predictions file. Two tasks cannot share one.
    pub predictions: PathBuf,
}

/// Evaluates one task; see [`evaluate_all`]. `observe(done, all)` is called before the first and after every answer.
///
/// # Errors
/// Returns the same errors as [`evaluate_all`].
pub fn evaluate(
    task: &dyn Task,
    model: &mut dyn LanguageModel,
    predictions: &Path,
    observe: &mut dyn FnMut(usize, usize),
) -> Result<Scores, Error> {
    let open = [Open { task, predictions: predictions.to_owned() }];
    let mut scores = evaluate_all(&open, model, &mut |_, done, all| {
        observe(done, all);
        ControlFlow::Continue(())
    })?;
    Ok(scores.remove(0))
}

/// Evaluates several tasks: sends the requests of all tasks to the model together, so that it can batch them, appends
/// each answer to its task's predictions file as it arrives, and computes scores. `observe(task, done, all)` is called
/// with the index of the task after every answer, and may stop the evaluation.
///
/// Answers in existing predictions files are reused, matched by request. An interrupted run can therefore be resumed,
/// documents may be added or reordered, and identical documents are sent to the model once. An incomplete last line is
/// discarded. Answers to other requests, such as those of a run with a larger limit, are kept at the end of the file
/// and not scored. On completion, the file is sorted by document, as after an uninterrupted run; log-likelihoods may
/// differ in the last bits, which depend on how the model batches.
///
/// Each file is locked while answers are appended to it. Several processes may write different files in one directory.
///
/// # Errors
/// Returns [`Error::NoDocuments`] if a task is empty, [`Error::Model`] or [`Error::Answers`] if the model fails,
/// [`Error::Interrupted`] if `observe` stops it, [`Error::OtherModel`] if a file has answers of another model,
/// [`Error::NotPredictions`] if it is not a predictions file (it is left unchanged), [`Error::Busy`] if another process
/// is writing to it, and [`Error::Io`] or [`Error::File`] if reading or writing fails.
pub fn evaluate_all(
    open: &[Open<'_>],
    model: &mut dyn LanguageModel,
    observe: &mut Observe<'_>,
) -> Result<Vec<Scores>, Error> {
    let fingerprint = model.fingerprint();
    let mut runs = open.iter().map(|o| TaskRun::start(o, fingerprint.as_deref())).collect::<Result<Vec<_>, _>>()?;
    for (index, run) in runs.iter_mut().enumerate() {
        run.begin()?;
        stopped(observe(index, run.done, run.task.len()))?;
    }
    let mut written = RequestBatch::default();
    let mut scored = RequestBatch::default();
    let mut continued = RequestBatch::default();
    for (index, run) in runs.iter().enumerate() {
        for document in run.saved.first_unanswered(&run.keys) {
            match &run.requests[document] {
                Request::Generate(r) => written.push((index, document), std::slice::from_ref(r)),
                Request::Loglikelihood(list) => scored.push((index, document), list),
                Request::Continuation(r) => continued.push((index, document), std::slice::from_ref(r)),
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
    continued.ask(
        &mut runs,
        observe,
        |requests, answered| model.loglikelihood(requests, answered),
        |answers| Response::Continuation(answers.into_iter().next().unwrap_or_default()),
    )?;
    runs.iter_mut().map(TaskRun::finish).collect()
}

/// Progress callback: receives the index of a task, its number of answered documents, and its number of documents.
pub type Observe<'a> = dyn FnMut(usize, usize, usize) -> ControlFlow<()> + 'a;

fn stopped(flow: ControlFlow<()>) -> Result<(), Error> {
    if flow.is_break() { Err(Error::Interrupted) } else { Ok(()) }
}

/// State of a task's evaluation: its requests, and the answers so far.
pub(super) struct TaskRun<'a> {
    task: &'a dyn Task,
    path: PathBuf,
    requests: Vec<Request>,
    keys: Vec<String>,
    askers: HashMap<String, usize>, // documents by key; identical ones are requested once
    done: usize,
    fingerprint: Option<String>,
    saved: Saved,
    log: Option<(File, FileLock)>,
}

impl<'a> TaskRun<'a> {
    pub(super) fn start(open: &Open<'a>, fingerprint: Option<&str>) -> Result<TaskRun<'a>, Error> {
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
        Ok(TaskRun { task, path, requests, keys, askers, done, fingerprint, saved, log: None })
    }

    /// Opens the file for appending under an exclusive lock, and truncates an incomplete last line. Creates its
    /// directory.
    fn begin(&mut self) -> Result<(), Error> {
        make_parent(&self.path)?;
        let lock = lock_log(&self.path)?;
        remove_leftovers(&self.path);
        // Another process may have changed the file after it was read.
        self.saved = Saved::read(&self.path)?;
        self.saved.check_model(&self.path, self.fingerprint.as_deref())?;
        self.done = self.saved.done(&self.keys);
        let end: &[u8] = if self.saved.unended { b"\n" } else { b"" };
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut file = open_log(&self.path, self.saved.whole).map_err(io)?;
        file.write_all(end).map_err(io)?;
        self.log = Some((file, lock));
        Ok(())
    }

    fn answer(&mut self, document: usize, response: Response) -> Result<(), Error> {
        let (target, metric) = (self.task.target(document), self.task.metric());
        let scores = metric.scores(&target, &response);
        let (task, request, model) =
            (self.task.name().to_owned(), self.keys[document].clone(), self.fingerprint.clone());
        let unscored = false;
        let prediction = Prediction { document, task, metric, request, model, response, target, scores, unscored };
        let io = |source| Error::Io { path: self.path.clone(), source };
        if let Some((file, _)) = &mut self.log {
            file.write_all(&to_jsonl(std::slice::from_ref(&prediction)).map_err(io)?).map_err(io)?;
        }
        self.done += self.askers.get(&prediction.request).copied().unwrap_or(0);
        self.saved.push(prediction);
        Ok(())
    }

    /// Returns one prediction per document, scored by the task's current metric.
    pub(super) fn answered(&self) -> Result<Vec<Prediction>, Error> {
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
            let (task, unscored) = (task.to_owned(), false);
            Ok(Prediction { document, task, metric, target, scores, unscored, ..saved.clone() })
        };
        self.keys.iter().enumerate().map(one).collect()
    }

    fn finish(&mut self) -> Result<Scores, Error> {
        let answered = self.answered()?;
        let io = |source| Error::Io { path: self.path.clone(), source };
        // Close the file before it is replaced, as Windows requires; the lock is held until then.
        let _lock = self.log.take().map(|(_, lock)| lock);
        write_whole(&self.path, &to_jsonl(&self.saved.in_order(&self.keys, &answered)).map_err(io)?)?;
        Ok(Scores::of(self.task.name(), self.task.metric(), &answered))
    }
}

/// Requests of one kind, the documents they belong to, and the answers so far.
struct RequestBatch<R, A> {
    requests: Vec<R>,
    owners: Vec<usize>,                      // index in `documents` of each request
    documents: Vec<((usize, usize), usize)>, // (run, document) and the index of its first request
    answers: Vec<Option<A>>,
    open: Vec<usize>, // number of unanswered requests of each document
}

impl<R, A> Default for RequestBatch<R, A> {
    fn default() -> Self {
        RequestBatch {
            requests: Vec::new(),
            owners: Vec::new(),
            documents: Vec::new(),
            answers: Vec::new(),
            open: Vec::new(),
        }
    }
}

impl<R: Clone, A> RequestBatch<R, A> {
    fn push(&mut self, document: (usize, usize), requests: &[R]) {
        let owner = self.documents.len();
        self.documents.push((document, self.requests.len()));
        self.open.push(requests.len());
        self.owners.extend(requests.iter().map(|_| owner));
        self.answers.extend(requests.iter().map(|_| None));
        self.requests.extend_from_slice(requests);
    }

    /// Assigns each answer to its document, and writes a document to its task's file when all its requests are
    /// answered.
    fn ask(
        mut self,
        runs: &mut [TaskRun<'_>],
        observe: &mut Observe<'_>,
        ask: impl FnOnce(&[R], &mut dyn FnMut(usize, A) -> Result<(), BoxError>) -> Result<(), BoxError>,
        response: impl Fn(Vec<A>) -> Response,
    ) -> Result<(), Error> {
        // A document without requests gets an empty answer.
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
                return Err(format!("unexpected answer to request {index} of {asked}").into());
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
            let stop = stopped(observe(run, runs[run].done, runs[run].task.len()));
            written.and(stop).map_err(|e| {
                let message = e.to_string();
                failure = Some(e);
                message.into()
            })
        });
        if let Some(error) = failure {
            return Err(error);
        }
        // The failing task is not known when tasks are batched; name the first unfinished one.
        let open = self.open.iter().position(|&n| n > 0).map_or(first, |o| self.documents[o].0.0);
        let name = || runs[open].task.name().to_owned();
        outcome.map_err(|source| Error::Model { task: name(), source })?;
        if got != asked {
            return Err(Error::Answers { task: name(), asked, got });
        }
        Ok(())
    }
}

/// Returns the key that identifies a request: the first 128 bits of a blake3 hash, which are enough.
fn key(request: &Request) -> String {
    let json = serde_json::to_vec(request).expect("texts and numbers always serialize");
    blake3::hash(&json).to_hex()[..32].to_owned()
}
