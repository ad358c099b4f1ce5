//! Reads completed runs as the results of a study.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, MAX_TOKENIZER, read_file, read_text};
use cl_eval::{Cell, MethodTable, ScoreMatrix, Scores, method_table};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::results::{Column, ResultRow, RowKind, StudyResults};

/// A directory with results, and its name in the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Name of the method; runs with the same name are seeds of one method.
    pub name: String,
    /// The directory.
    pub path: PathBuf,
}

impl Run {
    /// Parses `DIR` or `NAME=DIR`; the name defaults to that of the directory.
    ///
    /// ```
    /// use cl_report::Run;
    /// assert_eq!(Run::parse("LoRA=runs/a"), Run { name: "LoRA".to_owned(), path: "runs/a".into() });
    /// assert_eq!(Run::parse("runs/lora/").name, "lora");
    /// ```
    pub fn parse(text: &str) -> Run {
        match text.split_once('=') {
            Some((name, dir)) if !name.is_empty() && !name.contains(['/', '\\']) => {
                Run { name: name.to_owned(), path: dir.into() }
            }
            _ => {
                let path = PathBuf::from(text);
                let name = path.file_name().map_or(text.to_owned(), |n| n.to_string_lossy().into_owned());
                Run { name, path }
            }
        }
    }

    /// Returns the `results.json` of a study, if the run is a study.
    fn study_file(&self) -> Option<PathBuf> {
        let file = if self.path.is_dir() { self.path.join("results.json") } else { self.path.clone() };
        // `cl eval` also writes a `results.json`, in the harness's layout, which has no rows.
        #[derive(Deserialize)]
        struct Study {
            #[serde(rename = "rows")]
            _rows: serde::de::IgnoredAny,
        }
        serde_json::from_slice::<Study>(&read_file(&file, MAX_CONFIG).ok()?).ok().map(|_| file)
    }

    fn is_sequence(&self) -> bool {
        self.path.join("matrix.json").exists()
    }
}

impl StudyResults {
    /// Reads a study (a directory with its `results.json`, or that file), or builds one from completed runs:
    /// directories of `cl sequence` and of `cl eval`.
    ///
    /// Columns are those of the first sequence; without a sequence, the tasks of the first run, where those in `old`
    /// are old knowledge. Runs with the same name are seeds of one method. A run of `cl eval` named `base` is the base
    /// model; otherwise, the base scores of the first sequence are used.
    ///
    /// # Errors
    /// Returns an error if a run cannot be read or is of neither kind, or if two sequences train on a task in different
    /// rounds; and [`Error::Several`] if a study is given together with other runs.
    pub fn read(runs: &[Run], old: &[String]) -> Result<StudyResults, Error> {
        if let Some((run, file)) = runs.iter().find_map(|r| Some((r, r.study_file()?))) {
            if runs.len() > 1 {
                return Err(Error::Several { path: run.path.clone() });
            }
            return StudyResults::read_file(&file);
        }
        let named: Vec<(String, PathBuf)> = runs.iter().map(|r| (r.name.clone(), r.path.clone())).collect();
        let table = method_table(&named, None, old)?;
        let mut results = StudyResults { name: title(runs), ..StudyResults::default() };
        results.columns = table.columns.iter().map(column).collect();
        for (run, (_, cells)) in runs.iter().zip(&table.rows) {
            if run.is_sequence() {
                results.add_sequence(run, &table, cells)?;
            } else {
                results.add_scored(run, cells)?;
            }
        }
        results.seeds = results.rows.iter().filter(|r| r.kind != RowKind::Base).map(|r| r.seed).collect();
        results.seeds.sort_unstable();
        results.seeds.dedup();
        results.notes = runs.iter().map(|r| format!("{} was read from {}.", r.name, r.path.display())).collect();
        results.check()?;
        Ok(results)
    }

    /// Adds a row for each round of a sequence, and one for the base model if there is none yet.
    fn add_sequence(&mut self, run: &Run, table: &MethodTable, last: &[Cell]) -> Result<(), Error> {
        let matrix: ScoreMatrix = read_json(&run.path.join("matrix.json"))?;
        let places: Vec<Option<usize>> =
            self.columns.iter().map(|c| matrix.columns.iter().position(|own| own.name == c.name)).collect();
        for (column, place) in table.columns.iter().zip(&places) {
            if let Some(other) = place.map(|p| matrix.columns[p].round).filter(|round| *round != column.round) {
                let (path, task, first) = (run.path.clone(), column.name.clone(), column.round);
                return Err(Error::Rounds { path, task, first, other });
            }
        }
        let settings = Settings::read(&run.path);
        self.model = if self.model.is_empty() { settings.model } else { std::mem::take(&mut self.model) };
        let seed = self.seed(&run.name, settings.seed);
        let dirs = round_dirs(&run.path);
        let label = label(run, seed);
        for t in 0..matrix.rows.len() {
            if t == 0 && self.rows.iter().any(|r| r.kind == RowKind::Base) {
                continue;
            }
            let dir = dirs.get(&t);
            let scores = dir.map(|d| read_scores(&d.join("scores.json"))).transpose()?.unwrap_or_default();
            self.name_metrics(&scores);
            if t > self.rounds.len() {
                let name = dir.and_then(|d| Some(d.file_name()?.to_str()?.split_once('-')?.1.to_owned()));
                self.rounds.push(name.unwrap_or(matrix.rows[t].clone()));
            }
            let error = |c: &Column| {
                let task = scores.iter().find(|s| s.task == c.name)?;
                task.stderr.get(&task.main_metric).copied()
            };
            let mut row = ResultRow {
                stage: if t == 0 { format!("{label}, base") } else { format!("{label}, round {t}") },
                method: if t == 0 { "base".to_owned() } else { run.name.clone() },
                kind: if t == 0 { RowKind::Base } else { RowKind::Sequence },
                seed,
                round: (t > 0).then_some(t),
                standard_errors: self.columns.iter().map(error).collect(),
                scores: places.iter().map(|p| matrix.at(t, (*p)?)).collect(),
                ..blank()
            };
            if t > 0 && t + 1 == matrix.rows.len() {
                // Only these cells have standard errors for groups of tasks.
                let errors = row.standard_errors.iter_mut().zip(last);
                errors.for_each(|(error, cell)| *error = error.or(cell.and_then(|c| c.1)));
            }
            if let Some(dir) = dir.filter(|_| t > 0) {
                row.seconds = logged_seconds(&dir.join("log.jsonl"));
                row.bytes = ["adapter", "model"].iter().find_map(|d| bytes_of(&dir.join(d)));
            }
            self.rows.push(row);
        }
        Ok(())
    }

    /// Adds the row of a model that was scored by `cl eval`.
    fn add_scored(&mut self, run: &Run, cells: &[Cell]) -> Result<(), Error> {
        let base = run.name.eq_ignore_ascii_case("base");
        if base {
            self.rows.retain(|r| r.kind != RowKind::Base);
        }
        let scores = read_scores(&run.path.join("scores.json"))?;
        self.name_metrics(&scores);
        let seed = self.seed(&run.name, None);
        self.rows.push(ResultRow {
            stage: label(run, seed),
            method: if base { "base".to_owned() } else { run.name.clone() },
            kind: if base { RowKind::Base } else { RowKind::Other },
            seed,
            scores: cells.iter().map(|cell| cell.map(|c| c.0)).collect(),
            standard_errors: cells.iter().map(|cell| cell.and_then(|c| c.1)).collect(),
            ..blank()
        });
        Ok(())
    }

    fn name_metrics(&mut self, scores: &[Scores]) {
        for column in self.columns.iter_mut().filter(|c| c.metric.is_empty()) {
            if let Some(task) = scores.iter().find(|s| s.task == column.name) {
                column.metric = task.main_metric.clone();
            }
        }
    }

    /// Returns the seed of a run of this method, or the next free number if it is unknown or already used.
    fn seed(&self, method: &str, known: Option<u64>) -> u64 {
        let taken =
            |seed: &u64| self.rows.iter().any(|r| r.kind != RowKind::Base && r.method == method && r.seed == *seed);
        known.filter(|seed| !taken(seed)).unwrap_or_else(|| (1..).find(|seed| !taken(seed)).unwrap_or(0))
    }
}

/// The parts of a sequence's configuration that a report uses.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Settings {
    seed: Option<u64>,
    model: String,
}

impl Settings {
    /// Reads them from a directory; they are empty if the configuration cannot be read, since a report does not require
    /// it.
    fn read(dir: &Path) -> Settings {
        let text = read_text(&dir.join("config.toml"), MAX_CONFIG).unwrap_or_default();
        let settings: Settings = toml::from_str(&text).unwrap_or_default();
        // The model directories of runs are all called `model`, so the parent directory's name is included.
        let parts: Vec<&str> = settings.model.split(['/', '\\']).filter(|part| !part.is_empty()).collect();
        let shown = if parts.last() == Some(&"model") { 2 } else { 1 };
        Settings { model: parts[parts.len().saturating_sub(shown)..].join("/"), ..settings }
    }
}

fn blank() -> ResultRow {
    ResultRow {
        stage: String::new(),
        method: String::new(),
        kind: RowKind::Other,
        seed: 0,
        round: None,
        members: None,
        main: true,
        question: None,
        paper: None,
        scores: Vec::new(),
        standard_errors: Vec::new(),
        seconds: None,
        bytes: None,
        routing: None,
    }
}

fn column(column: &cl_eval::Column) -> Column {
    let cl_eval::Column { name, group, round } = column.clone();
    Column { name, group, metric: String::new(), chance: None, round, paper: None }
}

fn title(runs: &[Run]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        if !names.contains(&run.name.as_str()) {
            names.push(&run.name);
        }
    }
    names.join(", ")
}

/// Returns the name of a stage; no two runs with the same name have the same seed.
fn label(run: &Run, seed: u64) -> String {
    format!("{} (seed {seed})", run.name)
}

/// Returns the directories of the rounds by number; the base is 0.
fn round_dirs(dir: &Path) -> BTreeMap<usize, PathBuf> {
    let entries = std::fs::read_dir(dir.join("rounds")).into_iter().flatten();
    let number = |path: &PathBuf| path.file_name()?.to_str()?.split_once('-')?.0.parse().ok();
    entries.filter_map(|entry| Some(entry.ok()?.path())).filter_map(|path| Some((number(&path)?, path))).collect()
}

fn read_scores(path: &Path) -> Result<Vec<Scores>, Error> {
    if path.exists() { read_json(path) } else { Ok(Vec::new()) }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    serde_json::from_slice(&read_file(path, MAX_CONFIG)?)
        .map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// Returns the sum of the steps' seconds in a training log; `None` if there is no log, or if a line has no seconds.
fn logged_seconds(path: &Path) -> Option<f64> {
    #[derive(Deserialize)]
    struct Step {
        seconds: f64,
    }
    let text = read_text(path, MAX_TOKENIZER).ok()?;
    let steps: Option<Vec<f64>> =
        text.lines().map(|line| serde_json::from_str::<Step>(line).ok().map(|s| s.seconds)).collect();
    steps.filter(|s| !s.is_empty()).map(|s| s.iter().sum())
}

/// Returns the total size in bytes of the files in a directory, without subdirectories.
fn bytes_of(dir: &Path) -> Option<u64> {
    let files = std::fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.metadata().ok());
    Some(files.filter(|m| m.is_file()).map(|m| m.len()).sum())
}
