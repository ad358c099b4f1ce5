//! Scores from predictions files alone.

use std::collections::HashSet;
use std::path::Path;

use super::evaluate::{Open, Run};
use super::predictions::{Prediction, Saved};
use super::scores::Scores;
use crate::error::Error;
use crate::task::Task;

/// Scores a predictions file again by the task as it is now, without a model.
///
/// # Errors
/// [`Error::Io`], [`Error::NoDocuments`], [`Error::NotPredictions`], [`Error::Unanswered`].
pub fn rescore(task: &dyn Task, predictions: &Path) -> Result<Scores, Error> {
    let run = Run::start(&Open { task, predictions: predictions.to_owned() }, None)?;
    Ok(Scores::of(task.name(), task.metric(), &run.answered()?))
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
    Ok(tasks.into_iter().map(|(task, lines)| (Scores::of(&task, lines[0].metric, &lines), lines)).collect())
}
