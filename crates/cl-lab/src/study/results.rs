//! The results of a study's stages, for the report.

use cl_eval::{Column, TaskSpec};
use cl_report::{ResultRow, RowKind, StudyResults};
use serde_json::{Map, Value, json};

use super::config::StudyConfig;
use super::graph::Stage;
use super::work::Record;
use crate::RoundConfig;

/// Collects the results, and the duration of each stage. Durations are stored separately, so that an interrupted study
/// produces identical bytes.
pub(super) fn results(
    config: &StudyConfig,
    columns: &[Column],
    metrics: &[String],
    stages: &[(&Stage, &Record)],
) -> (StudyResults, Value) {
    let of_paper = teaches_the_papers_tasks(config);
    let columns: Vec<cl_report::Column> =
        columns.iter().zip(metrics).map(|(column, metric)| reported(config, column, metric, of_paper)).collect();
    let has_paper = columns.iter().any(|column| column.paper.is_some());
    let mut rows = Vec::new();
    for (stage, record) in stages {
        // For an open question, only the end of a sequence is reported.
        let skipped = if stage.row.question.is_some() { record.rows.len().saturating_sub(1) } else { 0 };
        for (i, scored) in record.rows.iter().enumerate().skip(skipped) {
            let in_sequence = stage.row.kind == RowKind::Sequence;
            let round = if in_sequence { Some(i + 1) } else { stage.row.round };
            let last = i + 1 == record.rows.len();
            rows.push(ResultRow {
                stage: if in_sequence { format!("{}/{}", stage.id, i + 1) } else { stage.id.clone() },
                method: stage.row.method.clone(),
                kind: stage.row.kind,
                seed: stage.row.seed,
                round,
                members: stage.row.members,
                main: stage.row.question.is_none(),
                question: stage.row.question.map(str::to_owned),
                paper: stage.row.paper(round, last).filter(|_| has_paper),
                scores: scored.scores.clone(),
                standard_errors: scored.standard_errors.clone(),
                // For a sequence, the total is in its last row.
                seconds: last.then_some(record.seconds),
                bytes: last.then_some(record.bytes),
                routing: record.routing.clone(),
            });
        }
    }
    let times: Map<String, Value> =
        rows.iter().filter_map(|row| Some((row.stage.clone(), json!(row.seconds?)))).collect();
    let results = StudyResults {
        name: config.name.clone(),
        description: config.description.clone(),
        model: config.base_name(),
        seeds: config.seeds.clone(),
        rounds: config.all_rounds().into_iter().map(|round| round.name).collect(),
        columns,
        rows,
        notes: Vec::new(),
    };
    (results, Value::Object(times))
}

/// Built-in tasks and their columns in the paper.
const PAPER: [(&str, &str); 15] = [
    ("C-STANCE", "cstan"),
    ("FOMC", "fomc"),
    ("MeetingBank", "meet"),
    ("Py150", "py150"),
    ("ScienceQA", "sci"),
    ("20Minuten", "20min"),
    ("gsm8k", "gsm8k"),
    ("gsm8k_cot", "gsmcot"),
    ("mmlu", "mmlu"),
    ("arc_challenge", "arc_c"),
    ("commonsense_qa", "comqa"),
    ("hellaswag", "hella"),
    ("openbookqa", "opnbk"),
    ("piqa", "piqa"),
    ("winogrande", "wino"),
];

/// Returns the column of a task in the paper.
fn in_paper(task: &str) -> Option<&'static str> {
    let built_in = TaskSpec::find(task)?.name;
    PAPER.iter().find(|(name, _)| *name == built_in).map(|(_, paper)| *paper)
}

/// Whether all rounds teach tasks of the paper. Otherwise, its numbers would be shown next to those of models that have
/// learned something else.
fn teaches_the_papers_tasks(config: &StudyConfig) -> bool {
    let taught = |round: RoundConfig| round.scored.unwrap_or_else(|| vec![round.name]);
    let tasks: Vec<String> = config.all_rounds().into_iter().flat_map(taught).collect();
    !tasks.is_empty() && tasks.iter().all(|task| in_paper(task).is_some())
}

fn reported(config: &StudyConfig, column: &Column, metric: &str, of_paper: bool) -> cl_report::Column {
    let said = config.columns.iter().find(|c| c.name == column.name);
    let paper = in_paper(&column.name).filter(|_| of_paper).map(str::to_owned);
    cl_report::Column {
        name: column.name.clone(),
        group: column.group,
        metric: metric.to_owned(),
        chance: said.and_then(|c| c.chance),
        round: column.round,
        paper: said.and_then(|c| c.paper.clone()).or(paper),
    }
}
