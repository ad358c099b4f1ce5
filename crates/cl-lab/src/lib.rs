#![doc = include_str!("../README.md")]

mod check;
mod config;
mod error;
mod model_dir;
mod observe;
mod output;
mod report;
mod reproduce;
mod round;
mod round_data;
mod router_states;
mod scoring;
mod sequence;
mod sources;
pub mod toy;

pub use check::{Finding, check_directory, check_sequence, check_train};
pub use config::{DataConfig, EvalConfig, Limits, Replay, SequenceConfig, TrainRun, read_sequence, read_train};
pub use error::LabError;
pub use model_dir::ModelRef;
pub use observe::{Event, Observer};
pub use report::{method_name, tables_of};
pub use reproduce::{Study, StudyConfig, reproduce};
pub use round::{RoundInput, RoundOutput, run_round, run_train};
pub use round_data::load_train_data;
pub use router_states::{Pooling, router_states};
pub use scoring::{LoadedModel, add_bos_token, score_model, write_scores};
pub use sequence::{SequenceReport, run_sequence};
