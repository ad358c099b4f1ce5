//! Comparison of two runs, document by document.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::bootstrap::{Estimate, Resampling, interval, mean, resampled_means};
use super::mcnemar::{McNemar, mcnemar};
use crate::error::Error;
use crate::metrics::Metric;
use crate::run::{Prediction, score_file};

/// Comparison of two runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Settings of the bootstrap.
    pub resampling: Resampling,
    /// Tasks in both runs, in the order of the first run.
    pub tasks: Vec<TaskComparison>,
    /// Unweighted mean over these tasks' main metrics. Documents are resampled within each task.
    pub overall: Means,
    /// Tasks that are only in the first run.
    pub only_a: Vec<String>,
    /// Tasks that are only in the second run.
    pub only_b: Vec<String>,
}

/// Comparison of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskComparison {
    /// Name of the task.
    pub task: String,
    /// Number of documents in both runs. All other figures refer to these.
    pub documents: usize,
    /// Number of documents that are only in the first run.
    pub only_a: usize,
    /// Number of documents that are only in the second run.
    pub only_b: usize,
    /// The main metric, which represents the task in tables.
    pub main_metric: String,
    /// Comparisons by metric name.
    pub metrics: BTreeMap<String, MetricComparison>,
}

/// Two means and their difference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Means {
    /// Mean of the first run.
    pub a: f64,
    /// Mean of the second run.
    pub b: f64,
    /// Second minus first, with its confidence interval.
    pub difference: Estimate,
}

/// Comparison of one metric of a task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricComparison {
    /// Mean of each run, and their difference.
    #[serde(flatten)]
    pub means: Means,
    /// McNemar's test, if every score is 0 or 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcnemar: Option<McNemar>,
}

/// Lists predictions files: replaces each directory in `paths` by its `.jsonl` files, sorted by name.
///
/// # Errors
/// Returns [`Error::NoPredictions`] if a directory has no such file, and [`Error::Io`] if it cannot be read.
pub fn prediction_files(paths: &[impl AsRef<Path>]) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths.iter().map(AsRef::as_ref) {
        if path.is_dir() {
            files.extend(files_in(path)?);
        } else {
            files.push(path.to_owned());
        }
    }
    Ok(files)
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let io = |source| Error::Io { path: dir.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "jsonl") && path.is_file() {
            found.push(path);
        }
    }
    if found.is_empty() {
        return Err(Error::NoPredictions { path: dir.to_owned() });
    }
    found.sort();
    Ok(found)
}

/// Compares two runs, each of which is a predictions file or a directory of them.
///
/// Documents are paired by task and request; identical requests are paired in order. Scores are recomputed from answers
/// and targets, so files of different versions can be compared. Intervals are those of [`crate::paired_difference`],
/// with the task's name as `stream`. For the overall difference, the r-th resamples of all tasks are combined (a
/// stratified bootstrap).
///
/// # Errors
/// Returns the errors of [`prediction_files`] and [`score_file`], [`Error::OtherTarget`] or [`Error::OtherMetric`] if
/// the runs score a document differently, [`Error::NothingInCommon`] if they have no document in common, and
/// [`Error::Resampling`] if `resampling` is invalid.
pub fn compare(a: &Path, b: &Path, resampling: Resampling) -> Result<Comparison, Error> {
    let Resampling { resamples, level, .. } = resampling;
    if !resampling.is_valid() {
        return Err(Error::Resampling { resamples, level });
    }
    let (runs_a, runs_b) = (RunPredictions::read(a)?, RunPredictions::read(b)?);
    let mut tasks = Vec::new();
    let mut overall = Pooled::default();
    for (task, lines_a) in &runs_a.tasks {
        let Some((_, lines_b)) = runs_b.tasks.iter().find(|(name, _)| name == task) else { continue };
        let paired = Paired::new(task, (a, lines_a), (b, lines_b))?;
        if !paired.pairs.is_empty() {
            tasks.push(paired.compare(resampling, &mut overall));
        }
    }
    if tasks.is_empty() {
        return Err(Error::NothingInCommon { a: a.to_owned(), b: b.to_owned() });
    }
    let overall = overall.means(tasks.len(), level);
    Ok(Comparison { resampling, tasks, overall, only_a: runs_a.without(&runs_b), only_b: runs_b.without(&runs_a) })
}

/// Predictions of one run, grouped by task.
struct RunPredictions {
    tasks: Vec<(String, Vec<Prediction>)>,
}

impl RunPredictions {
    fn read(path: &Path) -> Result<RunPredictions, Error> {
        let mut tasks: Vec<(String, Vec<Prediction>)> = Vec::new();
        let mut seen = HashSet::new();
        for file in prediction_files(&[path])? {
            for (scores, mut lines) in score_file(&file)? {
                lines.retain(|line| seen.insert((line.task.clone(), line.document)));
                match tasks.iter_mut().find(|(name, _)| *name == scores.task) {
                    Some((_, all)) => all.append(&mut lines),
                    None => tasks.push((scores.task, lines)),
                }
            }
        }
        tasks.iter_mut().for_each(|(_, lines)| lines.sort_by_key(|line| line.document));
        Ok(RunPredictions { tasks })
    }

    fn without(&self, other: &RunPredictions) -> Vec<String> {
        let has = |name: &String| other.tasks.iter().any(|(n, _)| n == name);
        self.tasks.iter().map(|(name, _)| name).filter(|name| !has(name)).cloned().collect()
    }
}

/// The documents of a task that are in both runs.
struct Paired<'p> {
    task: &'p str,
    metric: Metric,
    pairs: Vec<(&'p Prediction, &'p Prediction)>,
    only_a: usize,
    only_b: usize,
}

impl<'p> Paired<'p> {
    fn new(
        task: &'p str,
        (path_a, a): (&Path, &'p [Prediction]),
        (path_b, b): (&Path, &'p [Prediction]),
    ) -> Result<Self, Error> {
        let mut by_request: HashMap<&str, Vec<&Prediction>> = HashMap::new();
        b.iter().rev().for_each(|line| by_request.entry(&line.request).or_default().push(line));
        let partner = |line: &'p Prediction| Some((line, by_request.get_mut(line.request.as_str())?.pop()?));
        let pairs: Vec<_> = a.iter().filter_map(partner).collect();
        let paths = || (task.to_owned(), path_a.to_owned(), path_b.to_owned());
        for (x, y) in &pairs {
            if x.target != y.target {
                let (task, a, b) = paths();
                return Err(Error::OtherTarget { task, document: x.document, a, b });
            }
            if x.metric != y.metric {
                let ((task, a, b), metric_a, metric_b) = (paths(), x.metric.main(), y.metric.main());
                return Err(Error::OtherMetric { task, a, b, metric_a, metric_b });
            }
        }
        let metric = a.first().map_or(Metric::ExactMatch, |line| line.metric);
        let (only_a, only_b) = (a.len() - pairs.len(), b.len() - pairs.len());
        Ok(Paired { task, metric, pairs, only_a, only_b })
    }

    fn compare(&self, resampling: Resampling, overall: &mut Pooled) -> TaskComparison {
        let names: Vec<&String> = self.pairs[0].0.scores.keys().collect();
        let of = |line: &Prediction, name: &str| line.scores.get(name).copied().unwrap_or(0.0);
        let scores: Vec<(Vec<f64>, Vec<f64>)> =
            names.iter().map(|name| self.pairs.iter().map(|(x, y)| (of(x, name), of(y, name))).unzip()).collect();
        let differences: Vec<Vec<f64>> =
            scores.iter().map(|(a, b)| a.iter().zip(b).map(|(a, b)| b - a).collect()).collect();
        let lists: Vec<&[f64]> = differences.iter().map(Vec::as_slice).collect();
        let resampled = resampled_means(&lists, self.task, resampling);
        let main_metric = self.metric.main_of(&self.pairs[0].0.target);
        let mut metrics = BTreeMap::new();
        for ((name, (a, b)), resampled) in names.into_iter().zip(&scores).zip(resampled) {
            if *name == main_metric {
                overall.add(mean(a), mean(b), &resampled);
            }
            let (mean_a, mean_b) = (mean(a), mean(b));
            let difference = interval(mean_b - mean_a, resampled, resampling.level);
            let means = Means { a: mean_a, b: mean_b, difference };
            metrics.insert(name.clone(), MetricComparison { means, mcnemar: discordant(a, b) });
        }
        TaskComparison {
            task: self.task.to_owned(),
            documents: self.pairs.len(),
            only_a: self.only_a,
            only_b: self.only_b,
            main_metric,
            metrics,
        }
    }
}

fn discordant(a: &[f64], b: &[f64]) -> Option<McNemar> {
    let whole = a.iter().chain(b).all(|v| *v == 0.0 || *v == 1.0);
    let count = |more: &[f64], less: &[f64]| more.iter().zip(less).filter(|(m, l)| m > l).count() as u64;
    whole.then(|| mcnemar(count(a, b), count(b, a)))
}

/// Sums of the main metrics over tasks.
#[derive(Default)]
struct Pooled {
    a: f64,
    b: f64,
    resampled: Vec<f64>,
}

impl Pooled {
    fn add(&mut self, a: f64, b: f64, resampled: &[f64]) {
        self.a += a;
        self.b += b;
        self.resampled.resize(resampled.len(), 0.0);
        self.resampled.iter_mut().zip(resampled).for_each(|(sum, value)| *sum += value);
    }

    fn means(self, tasks: usize, level: f64) -> Means {
        let n = tasks as f64;
        let (a, b) = (self.a / n, self.b / n);
        let resampled = self.resampled.into_iter().map(|sum| sum / n).collect();
        Means { a, b, difference: interval(b - a, resampled, level) }
    }
}
