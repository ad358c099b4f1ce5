#![doc = include_str!("../README.md")]

pub mod adapter;
#[cfg(feature = "cli")]
pub mod cli;
mod diff;
mod error;
mod flag;
pub mod methods;
mod plan;
pub mod problem;
mod recipe;
#[cfg(feature = "cli")]
mod report;
mod run;
mod tensor;

pub use diff::{Diff, TensorDiff, diff};
pub use error::Error;
pub use methods::{
    Base, Divisor as DivisorChoice, Election, METHODS, MergeMethod, MergePieces, MethodInfo, ParameterInfo, Profile,
    Projection as ProjectionChoice, Rescale as RescaleChoice, Trimmed, merge_tensor,
};
pub use plan::Plan;
pub use problem::Problem;
pub use recipe::config::{
    ExtraTensors, FloatType, MergeConfig, MergeFile, MethodConfig, ModelConfig, Parameters, SliceConfig, SliceSource,
    Vocabulary,
};
pub use recipe::error::{ConfigError, MergekitProblem};
pub use recipe::parameter::{Filter, NumberOrGradient, Parameter};
pub use recipe::places::Named;
pub use recipe::registry::{MethodRegistry, PARAMETERS};
pub use recipe::tokenizer::{TokenConfig, TokenKind, TokenSource, TokenizerConfig};
pub use run::engine::{Summary, merge};
pub use run::estimate::{Estimate, estimate};
pub use run::options::MergeOptions;
pub use run::provenance::CONFIG_NAME;
pub use run::stages::{Event, check_output, run_file, run_file_with};
pub use tensor::{PIECE, Piece, Stream, TensorGroup, Values, select};
