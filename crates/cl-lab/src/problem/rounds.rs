use cl_checkpoint::files::shorten;
use cl_data::problem::{ColumnsProblem, MixtureProblem};
use cl_train::TrainError;

/// What is wrong with the rounds of a sequence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoundsProblem {
    /// There are none.
    #[error("neither `tasks` nor `[[rounds]]` is set: expected one of them")]
    None,
    /// They are given twice.
    #[error("both `tasks` and `[[rounds]]` are set: expected one of them")]
    TasksAndRounds,
    /// The name of a round cannot be that of its directory.
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
        /// Its second place, from 1.
        entry: usize,
    },
    /// A round is invalid.
    #[error("round `{name}`: {problem}")]
    Round {
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        problem: Box<RoundProblem>,
    },
}

/// What is wrong with one round.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoundProblem {
    /// The composition of its data.
    #[error(transparent)]
    Mixture(#[from] MixtureProblem),
    /// The names of the rows' fields.
    #[error(transparent)]
    Columns(#[from] ColumnsProblem),
    /// A validation setting.
    #[error("{0}")]
    Validation(#[source] TrainError),
    /// A key of its `train` is unknown, or a value has the wrong type.
    #[error("train: {}", shorten(&.0.to_string()))]
    TrainTable(serde_json::Error), // no source, whose text would be printed again at full length
    /// A training setting.
    #[error("train: {0}")]
    Train(#[source] TrainError),
    /// Settings of o-lora that rounds cannot have each for itself.
    #[error(
        "train.olora: `shape`, `earlier` and the presence of the table apply to the whole sequence; set them in its \
         [train.olora]"
    )]
    Olora,
}
