#![doc = include_str!("../README.md")]

mod adamw;
mod checkpoint;
mod config;
mod error;
mod gradient_sums;
mod log;
mod parts;
mod plan;
pub mod problem;
mod ranks;
mod report_to;
mod router;
mod schedule;
mod sharding;
mod train;
mod validation;

pub use cl_checkpoint::Precision;
pub use config::{Full, LossNorm, States, TrainConfig};
pub use error::TrainError;
pub use log::{StepLog, final_loss, read_log};
pub use plan::{Plan, TrainData};
pub use ranks::Ranks;
pub use report_to::ReportTo;
pub use router::RouterTraining;
pub use schedule::Schedule;
pub use sharding::SpreadWeights;
pub use train::{AtCheckpoint, Progress, TrainContext, TrainReport, train};
pub use validation::{Keep, Validation, ValidationConfig, ValidationReport};
