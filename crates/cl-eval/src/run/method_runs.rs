use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_file};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::scores::Scores;
use crate::Error;
use crate::matrix::{Cell, Column, Group, MethodTable, ScoreMatrix};

/// Reads completed runs as rows of one table: directories of `cl sequence` (their last round) or `cl eval`.
///
/// The columns are those of the first sequence; without a sequence, all tasks and groups of tasks of the first run, where
/// those in `old` are old knowledge. Members of a group have no columns of their own. The base is `base`, or else the first sequence's base model.
///
/// # Errors
/// Returns [`Error::NoColumn`] if a name in `old` is not a column, and an error if a directory is not a run of either
/// command, or its files cannot be read.
pub fn method_table(runs: &[(String, PathBuf)], base: Option<&Path>, old: &[String]) -> Result<MethodTable, Error> {
    let opened = runs.iter().map(|(_, dir)| FinishedRun::open(dir)).collect::<Result<Vec<FinishedRun>, Error>>()?;
    let sequence = opened.iter().find_map(|run| run.matrix.as_ref());
    let columns = match (sequence, opened.first()) {
        (Some(matrix), _) => matrix.columns.clone(),
        (None, Some(run)) => run.tasks_and_groups().iter().map(|name| column(name, old)).collect(),
        (None, None) => Vec::new(),
    };
    if let Some(name) = old.iter().find(|name| columns.iter().all(|column| column.name != **name)) {
        let columns = columns.iter().map(|column| column.name.clone()).collect();
        return Err(Error::NoColumn { name: name.clone(), columns });
    }
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

    /// Returns the names of all tasks and groups that are not members of a group, in the order of the evaluation.
    fn tasks_and_groups(&self) -> Vec<String> {
        let groups = self.results.get("group_subtasks").and_then(Value::as_object);
        let parent = |name: &str| {
            let has = |members: &Value| members.as_array().is_some_and(|all| all.iter().any(|m| m == name));
            groups?.iter().find(|(_, members)| has(members)).map(|(group, _)| group.clone())
        };
        let mut names = Vec::new();
        for scores in &self.scores {
            let mut name = scores.task.clone();
            // A group can be a member of another one; a broken file must not be followed in a circle.
            for _ in 0..groups.map_or(0, serde_json::Map::len) {
                name = parent(&name).unwrap_or(name);
            }
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn run(dir: &Path) -> Vec<(String, PathBuf)> {
        let scores = |task: &str, acc: f64| Scores {
            task: task.to_owned(),
            main_metric: "acc".to_owned(),
            metrics: BTreeMap::from([("acc".to_owned(), acc)]),
            stderr: BTreeMap::new(),
            documents: 2,
        };
        let all = [scores("first", 0.5), scores("stem_a", 0.25), scores("stem_b", 0.75), scores("law", 1.0)];
        std::fs::write(dir.join("scores.json"), json!(all).to_string()).unwrap();
        let results = json!({
            "groups": {"stem": {"acc,none": 0.5}, "school": {"acc,none": 0.625, "acc_stderr,none": 0.125}},
            "group_subtasks": {"school": ["stem", "law"], "stem": ["stem_a", "stem_b"]},
        });
        std::fs::write(dir.join("results.json"), results.to_string()).unwrap();
        vec![("run".to_owned(), dir.to_owned())]
    }

    #[test]
    fn a_group_is_one_column() {
        let folder = tempfile::tempdir().unwrap();
        let table = method_table(&run(folder.path()), None, &["school".to_owned()]).unwrap();
        let columns: Vec<(&str, Group)> = table.columns.iter().map(|c| (c.name.as_str(), c.group)).collect();
        assert_eq!(columns, [("first", Group::New), ("school", Group::Old)]);
        assert_eq!(table.rows[0].1, [Some((0.5, None)), Some((0.625, Some(0.125)))]);
    }

    #[test]
    fn an_unknown_old_task_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = method_table(&run(folder.path()), None, &["skool".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no column `skool`; the columns are first, school"), "{error}");
    }
}
