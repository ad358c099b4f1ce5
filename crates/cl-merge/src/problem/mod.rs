//! Problems that prevent a merge, each with its place and its facts as fields.
//!
//! ```
//! use cl_merge::problem::{ConfigProblem, Place, ProblemKind};
//! use cl_merge::{Error, MergeFile, Plan};
//! let file = MergeFile::from_toml("[method.ties]\ndensity = 2.0\n[[models]]\nmodel = \"nowhere\"")?;
//! let Err(Error::Problems(problems)) = Plan::new(&file.stages[0]) else { panic!("it was planned") };
//! assert_eq!(problems[0].place, Place::Key("method.ties".to_owned()));
//! let ProblemKind::Config(ConfigProblem::OutOfRange { parameter, value, .. }) = &*problems[0].kind else { panic!() };
//! assert_eq!((*parameter, *value), ("density", 2.0));
//! assert_eq!(problems[0].to_string(), "method.ties: `density` is 2; it must be 0 to 1");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adapter;
mod config;
mod memory;
mod model;
mod tokenizer;

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

pub use adapter::AdapterProblem;
pub use config::ConfigProblem;
pub use memory::MemoryProblem;
pub use model::ModelProblem;
pub use tokenizer::TokenizerProblem;

use crate::methods::SettingsError;

/// A problem that prevents a merge.
#[derive(Debug)]
#[non_exhaustive]
pub struct Problem {
    /// The place of the problem.
    pub place: Place,
    /// The kind of problem; boxed because problems are returned as errors.
    pub kind: Box<ProblemKind>,
}

/// The place of a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The merge file or the options as a whole.
    Whole,
    /// A key or a table of the merge file, or an option: `method.ties`, `weights`.
    Key(String),
    /// A slice of the merge file.
    Slice {
        /// Its number, from 1.
        number: usize,
        /// One of its sources, as written.
        model: Option<String>,
    },
    /// A stage of the merge file, by its number from 1.
    Stage(usize),
    /// A place in one of several stages.
    InStage {
        /// Name of the stage; `result` for a last stage without a name.
        stage: String,
        /// Place in the stage.
        place: Box<Place>,
    },
    /// A token under `tokenizer.tokens`.
    Token(String),
    /// A model, as written, or its directory.
    Model(String),
    /// Adapters, by their directories.
    Adapters(Vec<String>),
    /// A module of adapters.
    Module(String),
    /// An output tensor.
    Tensor(String),
    /// Several output tensors.
    Tensors {
        /// Name of the first tensor.
        first: String,
        /// Number of tensors.
        count: usize,
    },
    /// A file.
    File(PathBuf),
}

/// A kind of problem.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The merge file contradicts itself or a method.
    #[error(transparent)]
    Config(#[from] ConfigProblem),
    /// The settings of a method are invalid.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Models are incompatible.
    #[error(transparent)]
    Model(#[from] ModelProblem),
    /// Tokenizers are incompatible.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerProblem),
    /// Adapters are incompatible with each other, with their base or with what is requested.
    #[error(transparent)]
    Adapter(#[from] AdapterProblem),
    /// The memory limit is too low.
    #[error(transparent)]
    Memory(#[from] MemoryProblem),
    /// A model or an adapter cannot be opened or read.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
}

/// How the text of a kind is appended to the place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Joint {
    /// After a colon.
    Colon,
    /// As a sentence whose subject is the place.
    Sentence,
    /// Without the place, because the text names it.
    Alone,
}

impl Problem {
    pub(crate) fn new(place: Place, kind: impl Into<ProblemKind>) -> Problem {
        Problem { place, kind: Box::new(kind.into()) }
    }

    /// Creates a problem of the merge file, or the options, as a whole.
    pub(crate) fn whole(kind: impl Into<ProblemKind>) -> Problem {
        Problem::new(Place::Whole, kind)
    }

    /// Moves the problem into a stage.
    pub(crate) fn in_stage(self, stage: &str) -> Problem {
        let place = Place::InStage { stage: stage.to_owned(), place: Box::new(self.place) };
        Problem { place, kind: self.kind }
    }

    /// Creates a problem for a model or adapter that cannot be opened.
    pub(crate) fn unopened(dir: &Path, error: cl_checkpoint::Error) -> Problem {
        Problem::new(Place::File(dir.to_owned()), error)
    }
}

impl Place {
    pub(crate) fn key(key: &str) -> Place {
        Place::Key(key.to_owned())
    }

    pub(crate) fn model(written: &str) -> Place {
        Place::Model(written.to_owned())
    }

    pub(crate) fn adapter(name: &str) -> Place {
        Place::Adapters(vec![name.to_owned()])
    }

    pub(crate) fn tensor(name: &str) -> Place {
        Place::Tensor(name.to_owned())
    }

    /// Creates the place for one or several tensors.
    pub(crate) fn tensors(names: &[&str]) -> Place {
        match names {
            [one] => Place::tensor(one),
            all => Place::Tensors { first: all.first().unwrap_or(&"").to_string(), count: all.len() },
        }
    }
}

impl ProblemKind {
    fn joint(&self) -> Joint {
        match self {
            ProblemKind::Config(kind) => kind.joint(),
            ProblemKind::Model(kind) => kind.joint(),
            ProblemKind::Tokenizer(kind) => kind.joint(),
            ProblemKind::Adapter(kind) => kind.joint(),
            ProblemKind::Settings(_) => Joint::Colon,
            ProblemKind::Memory(_) | ProblemKind::Checkpoint(_) => Joint::Alone,
        }
    }
}

impl Display for Problem {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut place = &self.place;
        while let Place::InStage { stage, place: inner } = place {
            write!(f, "stage {stage}: ")?;
            place = inner;
        }
        match (self.kind.joint(), place) {
            (Joint::Alone, _) | (_, Place::Whole) => write!(f, "{}", self.kind),
            (Joint::Colon, place) => write!(f, "{place}: {}", self.kind),
            (Joint::Sentence, place) => write!(f, "{place} {}", self.kind),
        }
    }
}

impl std::error::Error for Problem {}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Place::Whole => Ok(()),
            Place::Key(text) | Place::Model(text) => f.write_str(text),
            Place::Slice { number, model: None } => write!(f, "slice {number}"),
            Place::Slice { number, model: Some(model) } => write!(f, "slice {number}, {model}"),
            Place::Stage(number) => write!(f, "stage {number}"),
            Place::InStage { stage, place } => match &**place {
                Place::Whole => write!(f, "stage {stage}"),
                place => write!(f, "stage {stage}: {place}"),
            },
            Place::Token(token) => write!(f, "tokenizer.tokens: `{token}`"),
            Place::Adapters(names) => f.write_str(&names.join(", ")),
            Place::Module(name) => write!(f, "module `{name}`"),
            Place::Tensor(name) => write!(f, "tensor `{name}`"),
            Place::Tensors { first, count } => write!(f, "{count} tensors (`{first}`, …)"),
            Place::File(path) => write!(f, "{}", path.display()),
        }
    }
}
