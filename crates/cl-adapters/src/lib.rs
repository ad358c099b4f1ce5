#![doc = include_str!("../README.md")]

mod config;
mod dropout;
mod error;
mod fold;
mod linear;
mod lora;
mod targets;

pub use config::{LoraConfig, TargetModules};
pub use dropout::Mode;
pub use error::AdapterError;
pub use fold::{FoldReport, fold};
pub use linear::Linear;
pub use lora::{Lora, check_supported, check_whole_tensors, save_lora};
pub use targets::Targets;
