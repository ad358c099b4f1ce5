#![doc = include_str!("../README.md")]

mod config;
mod dora;
mod dropout;
mod embedding;
mod error;
mod linear;
mod lora;
mod mixture;
mod olora;
mod peft;
mod random;
mod router_log;
mod start;
mod targets;
mod weight;
mod whole;

pub use config::{Bias, InitLoraWeights, LoraConfig, TargetModules, TokenIndices};
pub use dora::Magnitude;
pub use dropout::Mode;
pub use embedding::Embedding;
pub use error::{AdapterError, WholeProblem};
pub use linear::{Frozen, Linear};
pub use lora::{Lora, check_dora};
pub use mixture::LoraMixture;
pub use olora::{Lambda, OloraConfig, Orthogonality, Overlap, SequenceShape};
pub use peft::{Site, check_frozen, load_whole, save_lora};
pub use random::normal;
pub use router_log::{RouterLog, RouterRecord, RouterRecorder, top_k};
pub use targets::{Targets, is_router};
pub use weight::Weight;
pub use whole::{TokenRows, Whole, WholeKind, WholePlan, leaf};
