use std::fmt;
use std::path::PathBuf;

use crate::problem::{ConfigProblem, MixtureProblem, ProblemKind};

/// Errors of creating mixtures.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of a model or an output directory.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// A configuration does not parse.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: ConfigProblem,
    },
    /// All problems that prevent the mixture, found before anything was written.
    #[error("{} problem{} found; nothing was written:{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, list(.0))]
    Problems(Vec<Problem>),
    /// The files of a mixture of adapters are inconsistent, or an adapter cannot be part of a mixture.
    #[error("{path}: {problem}")]
    Mixture {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: MixtureProblem,
    },
    /// The hidden states for routers do not match the base's layers and the experts.
    #[error("{path}: tensor `{tensor}`: expected {expected:?} in f32, as the base and the experts have it")]
    RouterStates {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The expected shape.
        expected: Vec<usize>,
    },
    /// The hidden states for routers were made for something else.
    #[error("{path}: {}; run `cl moe states` again with this configuration", of_other(key, found, expected))]
    RouterStatesOrigin {
        /// The file.
        path: PathBuf,
        /// `base`, `pooling` or `prompts`.
        key: &'static str,
        /// The file's.
        found: String,
        /// The mixture's.
        expected: String,
    },
    /// The hidden states for routers have a value that is not finite.
    #[error("{path}: {expert}: its hidden state in layer {layer} contains {value}; run `cl moe states` again")]
    RouterStatesValue {
        /// The file.
        path: PathBuf,
        /// The expert.
        expert: String,
        /// The layer, from 0.
        layer: usize,
        /// The value: NaN or an infinity.
        value: f32,
    },
    /// An input has a value that is not finite.
    #[error(
        "{model}: tensor `{tensor}`: element {index} is {value}; the output of a model with this value would not be \
         finite"
    )]
    NotFinite {
        /// The model.
        model: String,
        /// The tensor.
        tensor: String,
        /// Row-major flat index.
        index: usize,
        /// The value: NaN or an infinity.
        value: f32,
    },
    /// The difference of an expert's matrix cannot be decomposed.
    #[error(
        "{model}: tensor `{tensor}`: the singular values of its difference from the base cannot be computed; store experts as \
         full or bitdelta"
    )]
    Decomposition {
        /// The expert's model.
        model: String,
        /// The tensor.
        tensor: String,
    },
    /// A stop was requested; nothing was written.
    #[error("stopped; nothing was written")]
    Interrupted,
}

/// One problem that prevents a mixture.
#[derive(Debug)]
#[non_exhaustive]
pub struct Problem {
    /// The key of the configuration, or the model.
    pub place: String,
    /// What is wrong.
    pub kind: Box<ProblemKind>,
}

impl Problem {
    pub(crate) fn new(place: &str, kind: impl Into<ProblemKind>) -> Problem {
        Problem { place: place.to_owned(), kind: Box::new(kind.into()) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.kind)
    }
}

fn of_other(key: &str, found: &str, expected: &str) -> String {
    match key {
        "pooling" => format!("made with the pooling `{found}`, but this mixture has `{expected}`"),
        "prompts" => format!("made from other prompts (blake3 {found}) than this mixture's (blake3 {expected})"),
        _ => format!("made with another {key} (blake3 {found}) than this mixture's (blake3 {expected})"),
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}
