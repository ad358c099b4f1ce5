use cl_checkpoint::files::shorten;
use cl_data::problem::{ColumnsProblem, MixtureProblem};
use cl_train::TrainError;

use super::{RoundsProblem, StudyProblem};

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// It is not TOML, a key is missing or unknown, or a value is invalid.
    #[error("{}", shorten(&.0.to_string()))]
    Toml(Box<toml::de::Error>), // not a source: its full text would be printed again
    /// A setting cannot be written as TOML.
    #[error("{0}")]
    NotToml(Box<toml::ser::Error>),
    /// A number is 0.
    #[error("{key} = 0: expected at least 1")]
    Zero {
        /// The key.
        key: &'static str,
    },
    /// A number is out of range.
    #[error("{key} = {value}: expected 1 to {most}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// Its value.
        value: usize,
        /// The largest allowed value.
        most: usize,
    },
    /// It is the configuration of another command.
    #[error("is the configuration of a {is}, with the key `{key}`; {hint}")]
    Other {
        /// What it configures, such as a `sequence` or a `merge`.
        is: &'static str,
        /// The key that identifies it.
        key: &'static str,
        /// Tells which command reads it.
        hint: &'static str,
    },
    /// `[replay]` is set, but there is no data of earlier rounds.
    #[error("[replay] has no data: list the data of earlier rounds in data.earlier, or remove the table")]
    NothingToReplay,
    /// A metric that is not for generated texts is set for all generation tasks.
    #[error(
        "eval.metric: acc, acc_norm and probability_mass are for multiple choice, greedy_match is for continuations; expected a metric of generated answers, such as exact_match"
    )]
    NotForTexts,
    /// There is no training data.
    #[error("data.train = []: expected at least one file or task directory")]
    NoData,
    /// A training setting is invalid.
    #[error("train: {0}")]
    Train(Box<TrainError>),
    /// A validation setting is invalid.
    #[error("{0}")]
    Validation(Box<TrainError>),
    /// The combination of data sets is invalid.
    #[error(transparent)]
    Mixture(#[from] MixtureProblem),
    /// The field names of the rows are invalid.
    #[error("data.{0}")]
    Columns(#[from] ColumnsProblem),
    /// The rounds are invalid.
    #[error(transparent)]
    Rounds(#[from] RoundsProblem),
    /// The settings of a study are invalid.
    #[error(transparent)]
    Study(#[from] StudyProblem),
    /// The configuration of a round contains settings of router training.
    #[error("train.router: routers are trained by `cl moe train-router`")]
    RouterInRound,
    /// Settings of router training in the wrong table.
    #[error("train.router: these keys belong in the table [router]")]
    RouterInTrain,
    /// A setting of router training is invalid.
    #[error("{0}")]
    Router(Box<TrainError>),
    /// The configuration of router training names data of earlier rounds.
    #[error("data.earlier is only for replay; list all data in data.train")]
    Earlier,
    /// There are fewer than two experts.
    #[error("at least two experts are required")]
    OneAdapter,
    /// An expert has no prompts to compute router weights from.
    #[error("{expert} has no positive_prompts; at least one is required")]
    NoPrompts {
        /// The expert's position in the configuration.
        expert: String,
    },
}

/// What is wrong with an argument of `--set`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetProblem {
    /// It has no value.
    #[error("expected key=value")]
    NoValue,
    /// It has no key.
    #[error("expected a key before =")]
    NoKey,
    /// Its number does not fit into TOML.
    #[error("the number is outside the range of TOML, -2⁶³ to 2⁶³ - 1")]
    Range,
    /// It sets a key inside a value that is not a table.
    #[error("a part of the key is not a table")]
    NotATable,
}
