#![doc = include_str!("../README.md")]

pub mod adapter;
#[cfg(feature = "cli")]
pub mod cli;
mod diff;
mod error;
pub mod methods;
mod plan;
mod recipe;
#[cfg(feature = "cli")]
mod report;
mod run;
mod tensor;

pub use diff::{Diff, TensorDiff, diff};
pub use error::Error;
pub use methods::{MergeMethod, MergePieces, merge_tensor};
pub use plan::Plan;
pub use recipe::config::{
    DivisorChoice, Election, ExtraTensors, FloatType, MergeConfig, MergeFile, MethodConfig, ModelConfig, Parameters,
    Profile, ProjectionChoice, RescaleChoice, SliceConfig, SliceSource, Trimmed, Vocabulary,
};
pub use recipe::parameter::{Filter, NumberOrGradient, Parameter};
pub use recipe::registry::{Base, METHODS, MethodInfo, PARAMETERS, ParameterInfo};
pub use run::engine::{Summary, merge};
pub use run::estimate::{Estimate, estimate};
pub use run::options::MergeOptions;
pub use run::provenance::CONFIG_NAME;
pub use run::stages::{Event, check_output, run_file};
pub use tensor::{PIECE, Piece, Stream, TensorGroup, Values, select};
