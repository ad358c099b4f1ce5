//! The command line: arguments and subcommands. Results are written to the writer `out`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;

use crate::{
    Comparison, Error, Estimate, Metric, Prediction, Resampling, Scores, Table, TaskComparison, compare, method_table,
    prediction_files, score_file,
};

/// Subcommands of `cl-eval`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Recompute scores from predictions files, without a model.
    Score(ScoreArgs),
    /// Compare two runs document by document: differences with confidence intervals, and McNemar's test.
    Compare(CompareArgs),
    /// Print one table of several runs: methods by tasks, with averages and gains over the base.
    Table(TableArgs),
}

/// Arguments of `table`.
#[derive(clap::Args)]
pub struct TableArgs {
    /// Directories of `cl sequence` (their last round) or `cl eval`, as DIR or NAME=DIR.
    #[arg(required = true, value_name = "[NAME=]DIR")]
    runs: Vec<String>,
    /// Run of the base model, for gains; by default, the base scores of the first sequence.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Tasks of old knowledge, separated by commas; by default, those of the first sequence.
    #[arg(long, value_delimiter = ',')]
    old: Vec<String>,
    /// Output format.
    #[arg(long, value_enum, default_value = "text")]
    format: TableFormat,
}

/// Output format of a table.
#[derive(clap::ValueEnum, Clone, Copy)]
pub enum TableFormat {
    /// Aligned columns.
    Text,
    /// Markdown.
    Markdown,
    /// Comma-separated values.
    Csv,
}

/// Arguments of `score`.
#[derive(clap::Args)]
pub struct ScoreArgs {
    /// Predictions files (.jsonl), or directories that contain them.
    #[arg(required = true)]
    predictions: Vec<PathBuf>,
    /// Score by this metric instead of the one in each file: acc, acc_norm, probability_mass, greedy_match,
    /// first_char, exact_match, rouge_l, rouge_l_swapped, sari, edit_similarity, gsm8k, gsm8k_cot.
    #[arg(long, value_parser = metric)]
    metric: Option<Metric>,
    /// Print JSON, in the format of scores.json.
    #[arg(long)]
    json: bool,
}

/// Arguments of `compare`.
#[derive(clap::Args)]
pub struct CompareArgs {
    /// The first run: a predictions file, or a directory that contains them.
    run1: PathBuf,
    /// The second run. Differences are second minus first.
    run2: PathBuf,
    /// Number of bootstrap resamples.
    #[arg(long, default_value_t = 10_000, value_parser = resamples)]
    resamples: usize,
    /// Random seed.
    #[arg(long, default_value_t = 1234)]
    seed: u64,
    /// Confidence level of the intervals, between 0 and 1.
    #[arg(long, default_value_t = 0.95, value_parser = level)]
    level: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs a subcommand.
///
/// # Errors
/// Returns an error if the command fails or `out` cannot be written.
pub fn run(command: &Command, out: &mut dyn Write) -> Result<()> {
    match command {
        Command::Score(args) => run_score(args, out),
        Command::Compare(args) => run_compare(args, out),
        Command::Table(args) => run_table(args, out),
    }
}

/// Prints a table of methods by tasks.
///
/// # Errors
/// Returns the errors of [`method_table`], and an error if `out` cannot be written.
pub fn run_table(args: &TableArgs, out: &mut dyn Write) -> Result<()> {
    let named = |run: &String| match run.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !name.contains(['/', '\\']) => (name.to_owned(), PathBuf::from(dir)),
        _ => (run.trim_end_matches(['/', '\\']).to_owned(), PathBuf::from(run)),
    };
    let runs: Vec<(String, PathBuf)> = args.runs.iter().map(named).collect();
    let table = method_table(&runs, args.base.as_deref(), &args.old)?;
    let table =
        table.table("Scores ± standard error. Gain over the base: mean of the gains of the tasks; (of means): gain of the mean score.");
    let text = match args.format {
        TableFormat::Text => table.text(),
        TableFormat::Markdown => table.markdown(),
        TableFormat::Csv => table.csv(),
    };
    Ok(write!(out, "{text}")?)
}

/// Recomputes scores from predictions files and prints a table, or JSON.
///
/// # Errors
/// Returns the errors of [`prediction_files`] and [`score_file`], [`Error::Unscorable`] if the chosen metric does not
/// fit the targets, and an error if `out` cannot be written.
pub fn run_score(args: &ScoreArgs, out: &mut dyn Write) -> Result<()> {
    let mut all = Vec::new();
    for path in prediction_files(&args.predictions)? {
        for (scores, lines) in score_file(&path)? {
            all.push(match args.metric {
                Some(metric) => scored_by(metric, lines, &path, &scores.task)?,
                None => scores,
            });
        }
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        write!(out, "{}", score_table(&all).text())?;
    }
    Ok(())
}

fn scored_by(metric: Metric, mut lines: Vec<Prediction>, path: &std::path::Path, task: &str) -> Result<Scores, Error> {
    for line in &mut lines {
        if let Some(needed) = metric.lacks(&line.target) {
            let (path, task) = (path.to_owned(), task.to_owned());
            return Err(Error::Unscorable { path, task, metric: metric.main(), needed });
        }
        line.scores = metric.scores(&line.target, &line.response);
    }
    Ok(Scores::of(task, metric, &lines))
}

/// Compares two runs and prints a table, or JSON.
///
/// # Errors
/// Returns the errors of [`compare`], and an error if `out` cannot be written.
pub fn run_compare(args: &CompareArgs, out: &mut dyn Write) -> Result<()> {
    let resampling = Resampling { resamples: args.resamples, seed: args.seed, level: args.level };
    let comparison = compare(&args.run1, &args.run2, resampling)?;
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&comparison)?)?;
        return Ok(());
    }
    write!(out, "{}", comparison_table(&comparison).text())?;
    for task in comparison.tasks.iter().filter(|t| t.only_a + t.only_b > 0) {
        writeln!(out, "{}: documents only in run 1: {}, only in run 2: {}", task.task, task.only_a, task.only_b)?;
    }
    for (run, tasks) in [(1, &comparison.only_a), (2, &comparison.only_b)] {
        if !tasks.is_empty() {
            writeln!(out, "only in run {run}: {}", tasks.join(", "))?;
        }
    }
    Ok(())
}

fn score_table(all: &[Scores]) -> Table {
    let row = |scores: &Scores, metric: &String, value: f64| {
        let stderr = scores.stderr.get(metric).map_or("–".to_owned(), |e| format!("{e:.4}"));
        let (name, documents) = (marked(metric, &scores.main_metric), scores.documents.to_string());
        vec![scores.task.clone(), name, format!("{value:.4}"), stderr, documents]
    };
    let rows = all.iter().flat_map(|s| s.metrics.iter().map(move |(metric, value)| row(s, metric, *value))).collect();
    let columns = ["task", "metric", "score", "stderr", "documents"].map(str::to_owned).to_vec();
    Table { caption: "* main metric, which represents the task in tables of sequences.".to_owned(), columns, rows }
}

fn comparison_table(comparison: &Comparison) -> Table {
    let mut rows: Vec<Vec<String>> = comparison.tasks.iter().flat_map(task_rows).collect();
    let overall = &comparison.overall;
    let tasks = "mean of tasks".to_owned();
    rows.push(numbers(
        vec![tasks, "main metrics".to_owned(), String::new()],
        overall.a,
        overall.b,
        &overall.difference,
    ));
    let Resampling { resamples, seed, level } = comparison.resampling;
    let columns =
        ["task", "metric", "documents", "run 1", "run 2", "difference", "low", "high", "only 1", "only 2", "p"];
    let caption = format!(
        "* main metric. Low, high: {}% confidence interval of the difference, from {resamples} paired bootstrap resamples, \
         seed {seed}. Only 1, only 2: documents that only this run answers correctly; p: McNemar's exact test.",
        level * 100.0
    );
    Table { caption, columns: columns.map(str::to_owned).to_vec(), rows }
}

fn task_rows(task: &TaskComparison) -> Vec<Vec<String>> {
    let row = |(metric, one): (&String, &crate::MetricComparison)| {
        let head = vec![task.task.clone(), marked(metric, &task.main_metric), task.documents.to_string()];
        let mut cells = numbers(head, one.means.a, one.means.b, &one.means.difference);
        if let Some(test) = one.mcnemar {
            cells.truncate(8);
            cells.extend([test.only_a.to_string(), test.only_b.to_string(), probability(test.p)]);
        }
        cells
    };
    task.metrics.iter().map(row).collect()
}

fn numbers(mut row: Vec<String>, a: f64, b: f64, difference: &Estimate) -> Vec<String> {
    row.extend([a, b].map(|v| format!("{v:.4}")));
    row.extend([difference.value, difference.low, difference.high].map(|v| format!("{v:+.4}")));
    row.extend(["–"; 3].map(str::to_owned));
    row
}

fn marked(metric: &str, main: &str) -> String {
    format!("{metric}{}", if metric == main { "*" } else { "" })
}

/// Formats a probability with four decimal places, or in scientific notation below 0.001.
fn probability(p: f64) -> String {
    if p >= 0.001 { format!("{p:.4}") } else { format!("{p:.1e}") }
}

fn metric(name: &str) -> Result<Metric, String> {
    serde_json::from_value(name.into()).map_err(|e| e.to_string())
}

fn resamples(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "must be a positive integer".to_owned())
}

fn level(text: &str) -> Result<f64, String> {
    let inside = |level: &f64| *level > 0.0 && *level < 1.0;
    text.parse().ok().filter(inside).ok_or_else(|| "must be between 0 and 1".to_owned())
}
