#![doc = include_str!("../README.md")]

#[cfg(feature = "cli")]
pub mod cli;
mod config;
mod error;
mod mergekit;
mod mix;
mod model_info;
mod names;
mod plan;
mod router;

pub use config::{ExpertConfig, FloatType, MixConfig, RouterConfig, RouterInit};
pub use error::{Error, Problem};
pub use mix::{MixOptions, Summary, mix};
pub use model_info::ModelInfo;
pub use plan::Plan;
pub use router::{ROUTER_STATES, router_states_spec};
