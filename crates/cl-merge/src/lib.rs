#![doc = include_str!("../README.md")]

pub mod adapter;
mod check;
#[cfg(feature = "cli")]
pub mod cli;
mod config;
mod diff;
mod draft;
mod engine;
mod error;
mod estimate;
mod extra;
mod inputs;
mod kernels;
mod mergekit;
mod method;
pub mod methods;
mod output;
mod parameter;
mod plan;
mod provenance;
mod random;
mod registry;
pub mod select;
mod settings;
mod stages;
mod tensor;

pub use config::{
    DivisorChoice, Election, ExtraTensors, FloatType, MergeConfig, MergeFile, MethodConfig, ModelConfig, Parameters,
    Profile, ProjectionChoice, RescaleChoice, SliceConfig, SliceSource, Trimmed, Vocabulary,
};
pub use diff::{Diff, TensorDiff, diff};
pub use engine::{MergeOptions, Summary, merge};
pub use error::Error;
pub use estimate::{Estimate, estimate};
pub use method::{MergeMethod, MergePieces, merge_tensor};
pub use parameter::{Filter, NumberOrGradient, Parameter};
pub use plan::Plan;
pub use provenance::CONFIG_NAME;
pub use random::Stream;
pub use registry::{Base, METHODS, MethodInfo, PARAMETERS, ParameterInfo};
pub use stages::{Event, check_output, run_file};
pub use tensor::{PIECE, Piece, TensorGroup, Values};
