use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_file};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::scores::Scores;
use crate::Error;
use crate::matrix::{Cell, Column, Group, MethodTable, ScoreMatrix};

/// Reads completed runs as rows of one table: directories of `cl sequence` (their last round) or `cl eval`.
///
/// The columns are those of the first sequence; without a sequence, all tasks of the first run, where those in `old`
/// are old knowledge. The base is `base`, or else the first sequence's base model.
///
/// # Errors
/// Returns an error if a directory is not a run of either command, or its files cannot be read.
pub fn method_table(runs: &[(String, PathBuf)], base: Option<&Path>, old: &[String]) -> Result<MethodTable, Error> {
    let opened = runs.iter().map(|(_, dir)| FinishedRun::open(dir)).collect::<Result<Vec<FinishedRun>, Error>>()?;
    let sequence = opened.iter().find_map(|run| run.matrix.as_ref());
    let columns = match (sequence, opened.first()) {
        (Some(matrix), _) => matrix.columns.clone(),
        (None, Some(run)) => run.scores.iter().map(|s| column(&s.task, old)).collect(),
        (None, None) => Vec::new(),
    };
    let base = match (base, sequence) {
        (Some(dir), _) => Some(FinishedRun::open(dir)?.cells(&columns)),
        (None, Some(matrix)) => Some((0..columns.len()).map(|c| Some((matrix.at(0, c)?, None))).collect()),
        (None, None) => None,
    };
    let rows = runs.iter().zip(&opened).map(|((name, _), run)| (name.clone(), run.cells(&columns))).collect();
    Ok(MethodTable { columns, base, rows })
}

fn column(task: &str, old: &[String]) -> Column {
    let group = if old.iter().any(|name| name == task) { Group::Old } else { Group::New };
    Column::new(task, group, None)
}

/// One run's scores.
struct FinishedRun {
    matrix: Option<ScoreMatrix>,
    scores: Vec<Scores>,
    results: Value,
}

impl FinishedRun {
    fn open(dir: &Path) -> Result<FinishedRun, Error> {
        let matrix = dir.join("matrix.json");
        if matrix.exists() {
            let last = last_round(dir).map(|round| round.join("scores.json")).filter(|path| path.exists());
            let scores = last.map(|path| read(&path)).transpose()?.unwrap_or_default();
            return Ok(FinishedRun { matrix: Some(read(&matrix)?), scores, results: Value::Null });
        }
        let results = dir.join("results.json");
        let results = if results.exists() { read(&results)? } else { Value::Null };
        Ok(FinishedRun { matrix: None, scores: read(&dir.join("scores.json"))?, results })
    }

    fn cells(&self, columns: &[Column]) -> Vec<Cell> {
        columns.iter().map(|column| self.cell(&column.name)).collect()
    }

    fn cell(&self, name: &str) -> Cell {
        let task = self.scores.iter().find(|s| s.task == name);
        let own = task.map(|s| (s.main(), s.stderr.get(&s.main_metric).copied()));
        own.or_else(|| self.in_matrix(name)).or_else(|| self.group(name))
    }

    /// Returns the score in the last row of a sequence's matrix.
    fn in_matrix(&self, name: &str) -> Cell {
        let matrix = self.matrix.as_ref()?;
        let place = matrix.columns.iter().position(|c| c.name == name)?;
        Some((matrix.at(matrix.rows.len().checked_sub(1)?, place)?, None))
    }

    /// Returns the score of a group of tasks: its first metric in `results.json`.
    fn group(&self, name: &str) -> Cell {
        let group = self.results.get("groups")?.get(name)?.as_object()?;
        let metric = group.keys().find(|key| key.ends_with(",none") && !key.contains("_stderr"))?;
        let error = metric.replace(",none", "_stderr,none");
        Some((group.get(metric)?.as_f64()?, group.get(&error).and_then(Value::as_f64)))
    }
}

/// Returns the directory of a sequence's last round.
fn last_round(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir.join("rounds")).ok()?;
    let number = |path: &PathBuf| path.file_name()?.to_str()?.split_once('-')?.0.parse::<u64>().ok();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter_map(|path| Some((number(&path)?, path)))
        .max()
        .map(|r| r.1)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = read_file(path, MAX_CONFIG)?;
    let expected = "what `cl sequence` or `cl eval` writes";
    serde_json::from_slice(&bytes).map_err(|error| {
        let line = error.line();
        Error::Line { path: path.to_owned(), line, expected, error }
    })
}
