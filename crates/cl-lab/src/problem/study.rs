use cl_adapters::AdapterError;
use cl_checkpoint::files::shorten;
use cl_data::problem::MixtureProblem;
use cl_train::TrainError;

use super::RoundsProblem;

/// What is wrong with the configuration of a study.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StudyProblem {
    /// A value is listed twice.
    #[error("{key}: {value} is listed twice")]
    Twice {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// There are no seeds, or a seed is too large.
    #[error("seeds: expected at least one, each at most {most}")]
    Seeds {
        /// The largest allowed seed.
        most: u64,
    },
    /// There are no threads.
    #[error("threads: must be at least 1")]
    Threads,
    /// `[[columns]]` describes a task that is not scored.
    #[error("columns: no task `{name}` is scored; expected one of {}", scored.join(", "))]
    NoColumn {
        /// The name.
        name: String,
        /// The names of the scored tasks.
        scored: Vec<String>,
    },
    /// The score of random guessing is out of range.
    #[error("columns: {name}: chance = {chance} is out of range; expected 0 to 1")]
    Chance {
        /// Name of the column.
        name: String,
        /// The value.
        chance: f64,
    },
    /// A number of models to merge is out of range.
    #[error("members: {members} is out of range; expected 2 to {rounds}, the number of rounds")]
    Members {
        /// The number.
        members: usize,
        /// Number of rounds.
        rounds: usize,
    },
    /// No round has the name of an expert.
    #[error("experts: no round is called `{name}`")]
    NoRound {
        /// Name of the expert.
        name: String,
    },
    /// The data of the rounds cannot be combined.
    #[error("compare: `joint` needs rounds whose `format` and `columns` are the same")]
    Joint,
    /// The fraction of replayed rows is invalid.
    #[error(transparent)]
    Replay(#[from] MixtureProblem),
    /// An o-LoRA setting is invalid.
    #[error("{0}")]
    Olora(Box<AdapterError>),
    /// A table is below `[train]` that belongs at the top level of a study.
    #[error("train.{table}: a study compares LoRA and full fine-tuning; write it as [{table}]")]
    TableInTrain {
        /// The table.
        table: &'static str,
    },
    /// A key of a table is unknown, or a value has the wrong type.
    #[error("[{table}]: {}", shorten(&error.to_string()))]
    Table {
        /// The table.
        table: &'static str,
        /// The parser's error.
        error: serde_json::Error, // not a source: its full text would be printed again
    },
    /// A training setting is invalid.
    #[error("[{table}]: {source}")]
    Train {
        /// The table.
        table: &'static str,
        /// What is wrong.
        r#source: Box<TrainError>,
    },
    /// The rounds are invalid.
    #[error(transparent)]
    Rounds(#[from] RoundsProblem),
    /// The rounds of a stage are invalid.
    #[error("stage {stage}: {problem}")]
    StageRounds {
        /// Name of the stage.
        stage: String,
        /// What is wrong.
        problem: RoundsProblem,
    },
    /// A training setting of a stage is invalid.
    #[error("stage {stage}: {source}")]
    StageTrain {
        /// Name of the stage.
        stage: String,
        /// What is wrong.
        r#source: Box<TrainError>,
    },
    /// No stage is selected by `--only`.
    #[error("--only: no stage's name starts with `{start}`; --dry-run lists them")]
    NoStage {
        /// The prefix given on the command line.
        start: String,
    },
}
