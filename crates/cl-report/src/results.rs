//! The results of a study, as stored in `results.json`.

use std::collections::BTreeSet;
use std::path::Path;

use cl_checkpoint::files::{MAX_CONFIG, read_file};
use cl_eval::Group;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The results of a study, with the same columns for every model. Stored as `results.json`.
///
/// Unknown fields are ignored, so that an older program can read newer studies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StudyResults {
    /// Name of the study.
    pub name: String,
    /// Description of the comparison, in one or two sentences.
    #[serde(default)]
    pub description: String,
    /// Name of the base model.
    #[serde(default)]
    pub model: String,
    /// Seeds of the study.
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// Names of the rounds, in order.
    #[serde(default)]
    pub rounds: Vec<String>,
    /// The scored tasks.
    pub columns: Vec<Column>,
    /// The scores, one row per model.
    pub rows: Vec<ResultRow>,
    /// Notes that are printed in the report.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A scored task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// Name of the task.
    pub name: String,
    /// Whether it is old or new knowledge.
    pub group: Group,
    /// Name of the metric.
    #[serde(default)]
    pub metric: String,
    /// Expected score of random guessing, in `[0, 1]`.
    #[serde(default)]
    pub chance: Option<f64>,
    /// The round (1-based) that trains on it.
    #[serde(default)]
    pub round: Option<usize>,
    /// The corresponding column of the paper, as in [`cl_eval::paper`], such as `cstan` or `mmlu`.
    #[serde(default)]
    pub paper: Option<String>,
}

/// The scores of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResultRow {
    /// Unique name of the stage that produced the model.
    pub stage: String,
    /// Name of the method for display, such as `LoRA`, `FFT`, `o-LoRA-l1(0.5)`, `LoRA-Rep`, `TIES`.
    pub method: String,
    /// Origin of the model.
    pub kind: RowKind,
    /// Seed of the stage.
    #[serde(default)]
    pub seed: u64,
    /// For a sequence, the round (1-based) after which the model was scored; for one round, the round it was trained
    /// on.
    #[serde(default)]
    pub round: Option<usize>,
    /// For merges and mixtures, the number of combined models.
    #[serde(default)]
    pub members: Option<usize>,
    /// Whether the row belongs to the main comparison, not to an open question.
    #[serde(default = "yes")]
    pub main: bool,
    /// The open question it belongs to, such as `DARE with and without rescale`.
    #[serde(default)]
    pub question: Option<String>,
    /// Label of the row in the paper's tables, such as `LoRA 1-3` or `Joint-FFT`.
    #[serde(default)]
    pub paper: Option<String>,
    /// Scores in `[0, 1]`, one per column; `None` if not measured.
    pub scores: Vec<Option<f64>>,
    /// Standard errors over the documents of each task, one per column, or empty.
    #[serde(default)]
    pub standard_errors: Vec<Option<f64>>,
    /// Duration of the stage in seconds.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// Size of the stage in bytes.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// For a mixture of experts, its router statistics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,
}

/// Router statistics of a mixture on the data of each round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// The round that each expert was trained on.
    pub experts: Vec<String>,
    /// Statistics by round.
    pub tasks: Vec<TaskRouting>,
}

/// Router statistics on the data of one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRouting {
    /// Name of the round.
    pub task: String,
    /// Each expert's share of a token's gates, averaged over tokens and routers; sums to 1.
    pub shares: Vec<f64>,
}

/// Origin of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowKind {
    /// The base model.
    Base,
    /// One round of training on the base model.
    OneRound,
    /// A sequence of rounds.
    Sequence,
    /// Training on all tasks at once.
    Joint,
    /// Models merged into one.
    Merge,
    /// Models or adapters combined to a mixture of experts.
    MixtureOfExperts,
    /// A scored model of unknown origin.
    Other,
}

fn yes() -> bool {
    true
}

impl StudyResults {
    /// Reads a `results.json`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, does not have this format, or is [not
    /// consistent](StudyResults::check).
    pub fn read_file(path: &Path) -> Result<StudyResults, Error> {
        let results: StudyResults = serde_json::from_slice(&read_file(path, MAX_CONFIG)?)
            .map_err(|source| Error::Json { path: path.to_owned(), source })?;
        results.check()?;
        Ok(results)
    }

    /// Checks that every row has one score per column, either no standard errors or one per column, a unique stage, and
    /// an existing round.
    ///
    /// # Errors
    /// Returns [`Error::Row`] for the first inconsistent row, and [`Error::NoColumns`] if there are no columns.
    pub fn check(&self) -> Result<(), Error> {
        if self.columns.is_empty() {
            return Err(Error::NoColumns);
        }
        let mut stages = BTreeSet::new();
        for row in &self.rows {
            let problem = |problem: String| Err(Error::Row { stage: row.stage.clone(), problem });
            let (columns, scores, errors) = (self.columns.len(), row.scores.len(), row.standard_errors.len());
            if scores != columns {
                return problem(format!("has {scores} scores for {columns} columns"));
            }
            if errors != 0 && errors != columns {
                return problem(format!("has {errors} standard errors for {columns} columns"));
            }
            if let Some(round) = row.round.filter(|&r| r == 0 || r > self.rounds.len()) {
                return problem(format!("is of round {round}; the study has rounds 1 to {}", self.rounds.len()));
            }
            if !stages.insert(&row.stage) {
                return problem("is listed twice; stages need unique names".to_owned());
            }
        }
        Ok(())
    }
}

impl ResultRow {
    /// Returns the score of a column; `None` if it was not measured or is not finite.
    pub fn score(&self, column: usize) -> Option<f64> {
        self.scores.get(column).copied().flatten().filter(|v| v.is_finite())
    }

    /// Returns the standard error of a column's score over its documents.
    pub fn standard_error(&self, column: usize) -> Option<f64> {
        self.standard_errors.get(column).copied().flatten().filter(|e| e.is_finite())
    }
}
