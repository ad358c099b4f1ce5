#![doc = include_str!("../README.md")]

mod architecture;
mod blend;
#[cfg(feature = "cli")]
pub mod cli;
mod config;
mod config_file;
mod delta;
mod error;
mod memory;
mod mergekit;
mod mix;
mod mixture;
mod model_info;
mod names;
mod plan;
pub mod problem;
mod router;
mod storage;
mod task_vectors;
mod trained;

pub use blend::{BlendConfig, BlendExpert, BlendInit, BlendPlan, BlendRouter, blend};
pub use config::{
    ExpertConfig, FloatType, MixArchitecture, MixConfig, MixModule, Pooling, RouterConfig, RouterInit, SharedExpert,
    expert_name,
};
pub use error::{Error, Problem};
pub use mix::{MixOptions, Summary, mix};
pub use mixture::{Mixture, MixtureConfig, MixtureExpert, ModuleExperts, RouterLogits, RouterNorm, mixture_tensors};
pub use model_info::{ModelBytes, ModelInfo};
pub use plan::Plan;
pub use router::{ROUTER_STATES, SHARED_STATES, router_states_metadata, router_states_spec};
pub use storage::{ExpertStorage, low_rank_delta_tensors, parameters, sign_delta_tensors};
pub use trained::{RouterWeights, save_mixture_with_routers, save_model_with_routers};
