//! `results.json` in the layout of lm-evaluation-harness, for tools that read the harness's files.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::write_whole;
use super::scores::{PERPLEXITY, Scores};
use crate::TaskGroup;
use crate::error::Error;

/// Scores and settings of a task.
#[derive(Clone, Debug)]
pub struct TaskResult<'s> {
    /// Its scores.
    pub scores: &'s Scores,
    /// Settings from [`crate::Task::settings`]. The number of few-shot examples is their key `num_fewshot`, or 0; the
    /// version is their key `version`, or 1.
    pub settings: Map<String, Value>,
    /// Number of documents before applying the limit; defaults to the number scored.
    pub original: Option<usize>,
}

/// Scores of a group.
#[derive(Clone, Debug)]
pub struct GroupResult<'s> {
    /// The group.
    pub group: &'s TaskGroup,
    /// Scores over all of its tasks.
    pub scores: &'s Scores,
}

/// Settings of a run.
#[derive(Clone, Debug, Default)]
pub struct RunSettings {
    /// Name or directory of the model, for display.
    pub model: String,
    /// Its fingerprint.
    pub fingerprint: Option<String>,
    /// Name or directory of an adapter.
    pub adapter: Option<String>,
    /// Dtype of the computation.
    pub dtype: String,
    /// Format of the model's linear layers in memory, if they are quantized.
    pub quantization: Option<String>,
    /// Whether a BOS token is prepended to every text.
    pub add_bos_token: Option<bool>,
    /// The chat template of the prompts.
    pub chat_template: Option<String>,
    /// Maximum number of tokens of prompt and answer.
    pub max_length: Option<usize>,
    /// Maximum number of tokens in a batch.
    pub batch_tokens: Option<usize>,
    /// Maximum number of documents per task.
    pub limit: Option<usize>,
}

/// Returns the harness's names of a score: metric and filter.
///
/// ```
/// assert_eq!(cl_eval::harness_metric("acc_norm"), ("acc_norm", "none"));
/// assert_eq!(cl_eval::harness_metric("flexible_extract"), ("exact_match", "flexible-extract"));
/// assert_eq!(cl_eval::harness_metric("exact_match,last-number"), ("exact_match", "last-number"));
/// assert_eq!(cl_eval::harness_metric("probability_mass"), ("acc", "none"));
/// assert_eq!(cl_eval::harness_metric("greedy_match"), ("acc", "none"));
/// ```
pub fn harness_metric(metric: &str) -> (&str, &str) {
    match metric {
        "flexible_extract" => ("exact_match", "flexible-extract"),
        "strict_match" => ("exact_match", "strict-match"),
        "probability_mass" | "greedy_match" => ("acc", "none"),
        other => other.split_once(',').unwrap_or((other, "none")),
    }
}

/// Returns results in the layout of lm-evaluation-harness 0.4.13, without its time, host and environment: equal runs
/// give equal files.
///
/// Values for which the harness has no key (fingerprint, batch tokens, this crate's version) are in `config`. The
/// standard error of a single document is the string `"N/A"`, as in the harness. A group's scores are in `results` and
/// also in `groups`.
///
/// ```
/// use cl_eval::{RunSettings, Scores, TaskResult, results};
/// let metrics = [("acc".to_owned(), 0.5)].into();
/// let stderr = [("acc".to_owned(), 0.1)].into();
/// let scores = Scores { task: "piqa".to_owned(), documents: 26, main_metric: "acc".to_owned(), metrics, stderr };
/// let task = TaskResult { scores: &scores, settings: serde_json::Map::new(), original: Some(500) };
/// let json = results(&[task], &[], &RunSettings { model: "models/a".to_owned(), ..RunSettings::default() });
/// assert_eq!(json["results"]["piqa"]["acc_stderr,none"], 0.1);
/// assert_eq!(json["n-samples"]["piqa"]["original"], 500);
/// ```
pub fn results(tasks: &[TaskResult<'_>], groups: &[GroupResult<'_>], run: &RunSettings) -> Value {
    let mut of_all = Map::new();
    for group in groups {
        of_all.insert(group.group.name.clone(), group_entry(group));
    }
    let of_groups = of_all.clone();
    of_all.extend(tasks.iter().map(|t| (t.scores.task.clone(), entry(&t.scores.task, t.scores))));
    let by_task = |value: &dyn Fn(&TaskResult<'_>) -> Value| -> Map<String, Value> {
        tasks.iter().map(|t| (t.scores.task.clone(), value(t))).collect()
    };
    let by_group = |value: &dyn Fn(&GroupResult<'_>) -> Option<Value>| -> Map<String, Value> {
        groups.iter().filter_map(|g| Some((g.group.name.clone(), value(g)?))).collect()
    };
    let with_groups = |mut of_tasks: Map<String, Value>, of_groups| {
        of_tasks.extend::<Map<String, Value>>(of_groups);
        of_tasks
    };
    let all: Vec<&TaskGroup> = groups.iter().map(|g| g.group).collect();
    let shots = by_task(&|t| setting(t, "num_fewshot", json!(0)));
    let shots_of_group = by_group(&|g| same(g.group.members.iter().map(|task| shots.get(task))));
    let versions = by_task(&|t| setting(t, "version", json!(1)));
    let higher = by_task(&|t| higher_is_better(t.scores));
    let mut json = Map::new();
    json.insert("results".to_owned(), of_all.into());
    if !groups.is_empty() {
        json.insert("groups".to_owned(), of_groups.into());
    }
    json.insert("group_subtasks".to_owned(), by_group(&|g| Some(json!(subtasks(g.group, &all)))).into());
    json.insert("configs".to_owned(), by_task(&config).into());
    json.insert("versions".to_owned(), with_groups(versions, by_group(&|g| Some(json!(g.group.version)))).into());
    json.insert("n-shot".to_owned(), with_groups(shots.clone(), shots_of_group).into());
    let higher = with_groups(higher, by_group(&|g| Some(higher_is_better(g.scores))));
    json.insert("higher_is_better".to_owned(), higher.into());
    json.insert("n-samples".to_owned(), by_task(&samples).into());
    json.insert("config".to_owned(), run_config(run));
    json.insert("model_source".to_owned(), json!("cl"));
    json.insert("model_name".to_owned(), json!(run.model));
    json.insert("max_length".to_owned(), json!(run.max_length));
    json.insert("chat_template".to_owned(), json!(run.chat_template));
    json.into()
}

/// Writes results as indented JSON, atomically. Creates the directory.
///
/// # Errors
/// Returns an error if writing fails.
pub fn write_results(path: &Path, results: &Value) -> Result<(), Error> {
    write_whole(path, format!("{results:#}\n").as_bytes())
}

fn entry(name: &str, scores: &Scores) -> Value {
    let mut entry = Map::new();
    entry.insert("name".to_owned(), json!(name));
    entry.insert("alias".to_owned(), json!(name));
    entry.insert("sample_len".to_owned(), json!(scores.documents));
    for (ours, value) in &scores.metrics {
        let (metric, filter) = harness_metric(ours);
        let stderr = scores.stderr.get(ours).filter(|e| e.is_finite()).map_or(json!("N/A"), |e| json!(e));
        entry.insert(format!("{metric},{filter}"), json!(value));
        entry.insert(format!("{metric}_stderr,{filter}"), stderr);
    }
    entry.into()
}

/// Returns the entry of a group: that of a task, with the number of documents by metric.
fn group_entry(group: &GroupResult<'_>) -> Value {
    let mut entry = entry(&group.group.name, group.scores);
    let counts = group.scores.metrics.keys().map(|ours| {
        let (metric, filter) = harness_metric(ours);
        (format!("{metric},{filter}"), json!(group.scores.documents))
    });
    entry["sample_count"] = counts.collect::<Map<String, Value>>().into();
    entry
}

/// Returns the direct members of a group: smaller groups whose tasks are all in it, and the tasks that are in none of
/// them.
fn subtasks(group: &TaskGroup, all: &[&TaskGroup]) -> Vec<String> {
    let within = |small: &TaskGroup, large: &TaskGroup| {
        small.members.len() < large.members.len() && small.members.iter().all(|task| large.members.contains(task))
    };
    let inner: Vec<&TaskGroup> = all.iter().copied().filter(|g| within(g, group)).collect();
    let direct: Vec<&&TaskGroup> = inner.iter().filter(|g| !inner.iter().any(|other| within(g, other))).collect();
    let alone = group.members.iter().filter(|task| !direct.iter().any(|g| g.members.contains(task)));
    direct.iter().map(|g| &g.name).chain(alone).cloned().collect()
}

/// Returns the common value, or `None` if values differ or one is absent.
fn same<'v>(mut values: impl Iterator<Item = Option<&'v Value>>) -> Option<Value> {
    let first = values.next()??;
    values.all(|value| value == Some(first)).then(|| first.clone())
}

fn higher_is_better(scores: &Scores) -> Value {
    let better = |metric: &String| (harness_metric(metric).0.to_owned(), Value::Bool(metric != PERPLEXITY));
    scores.metrics.keys().map(better).collect::<Map<_, _>>().into()
}

fn config(task: &TaskResult<'_>) -> Value {
    let mut config = Map::new();
    config.insert("task".to_owned(), json!(task.scores.task));
    let metric = |m: &String| {
        let aggregation = if m == PERPLEXITY { PERPLEXITY } else { "mean" };
        json!({"metric": harness_metric(m).0, "aggregation": aggregation, "higher_is_better": m != PERPLEXITY})
    };
    let mut metrics: Vec<Value> = task.scores.metrics.keys().map(metric).collect();
    metrics.dedup(); // exact_match with two filters is one metric
    config.insert("metric_list".to_owned(), metrics.into());
    config.extend(task.settings.clone());
    config.into()
}

fn setting(task: &TaskResult<'_>, key: &str, default: Value) -> Value {
    task.settings.get(key).cloned().unwrap_or(default)
}

fn samples(task: &TaskResult<'_>) -> Value {
    let effective = task.scores.documents;
    json!({"original": task.original.unwrap_or(effective), "effective": effective})
}

fn run_config(run: &RunSettings) -> Value {
    json!({
        "model": "cl",
        "model_args": {"pretrained": run.model, "peft": run.adapter, "dtype": run.dtype, "add_bos_token": run.add_bos_token},
        "model_fingerprint": run.fingerprint,
        "model_dtype": run.dtype,
        "quantization": run.quantization,
        "max_length": run.max_length,
        "batch_tokens": run.batch_tokens,
        "limit": run.limit,
        "cl_version": env!("CARGO_PKG_VERSION"),
    })
}
