//! Computes scores from saved predictions, without a model.

use std::collections::HashSet;
use std::path::Path;

use super::evaluate::{Open, TaskRun};
use super::predictions::{Prediction, Saved};
use super::scores::Scores;
use crate::error::Error;
use crate::task::Task;

/// Scores a predictions file with a task's current metric and targets, without a model.
///
/// # Errors
/// Returns [`Error::Unanswered`] if a document has no answer, [`Error::NoDocuments`] if the task is empty,
/// [`Error::NotPredictions`] if the file is not a predictions file, and an error if it cannot be read.
pub fn rescore(task: &dyn Task, predictions: &Path) -> Result<Scores, Error> {
    let run = TaskRun::start(&Open { task, predictions: predictions.to_owned() }, None)?;
    Ok(Scores::of(task.name(), task.metric(), &run.answered()?))
}

/// Scores a predictions file with the metrics and targets stored in it; needs neither model nor data. Tasks are in the
/// order of their first lines. A document that occurs twice counts once, and [unscored](Prediction::unscored) answers do
/// not count.
///
/// # Errors
/// Returns [`Error::NoDocuments`] if the file is empty, [`Error::NotPredictions`] if it is not a predictions file, and
/// an error if it cannot be read.
pub fn score_file(predictions: &Path) -> Result<Vec<(Scores, Vec<Prediction>)>, Error> {
    cl_checkpoint::files::open_file(predictions)?;
    let mut tasks: Vec<(String, Vec<Prediction>)> = Vec::new();
    let mut seen = HashSet::new();
    for mut line in Saved::read(predictions)?.lines {
        if line.unscored || !seen.insert((line.task.clone(), line.document)) {
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
