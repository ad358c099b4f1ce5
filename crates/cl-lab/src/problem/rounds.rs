use cl_checkpoint::files::shorten;
use cl_data::problem::{ColumnsProblem, MixtureProblem};
use cl_train::TrainError;

/// What is wrong with the rounds of a sequence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoundsProblem {
    /// There are no rounds.
    #[error("neither `tasks` nor `[[rounds]]` is set: expected one of them")]
    None,
    /// Rounds are specified twice.
    #[error("both `tasks` and `[[rounds]]` are set: expected one of them")]
    TasksAndRounds,
    /// The name of a round cannot be used as a directory name.
    #[error("{key}: `{name}` is not a valid directory name")]
    Name {
        /// `tasks` or `rounds`.
        key: &'static str,
        /// The name.
        name: String,
    },
    /// Two rounds have the same name.
    #[error("{key}: `{name}` occurs again as entry {entry}")]
    Twice {
        /// `tasks` or `rounds`.
        key: &'static str,
        /// The name.
        name: String,
        /// Position of the second occurrence, from 1.
        entry: usize,
    },
    /// A round is invalid.
    #[error("round `{name}`: {problem}")]
    Round {
        /// Its name.
        name: String,
        /// What is wrong.
        problem: Box<RoundProblem>,
    },
}

/// What is wrong with a round.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoundProblem {
    /// The combination of its data sets is invalid.
    #[error(transparent)]
    Mixture(#[from] MixtureProblem),
    /// The field names of the rows are invalid.
    #[error(transparent)]
    Columns(#[from] ColumnsProblem),
    /// A validation setting is invalid.
    #[error("{0}")]
    Validation(TrainError),
    /// A key in its `train` table is unknown, or a value has the wrong type.
    #[error("train: {}", shorten(&.0.to_string()))]
    TrainTable(serde_json::Error), // not a source: its full text would be printed again
    /// A training setting is invalid.
    #[error("train: {0}")]
    Train(TrainError),
    /// It sets o-lora options that can only be set for the whole sequence.
    #[error(
        "train.olora: `shape`, `earlier` and the presence of the table apply to the whole sequence; set them in its \
         [train.olora]"
    )]
    Olora,
}
