#![doc = include_str!("../README.md")]

mod adapter;
mod adapter_config;
mod beside;
mod checkpoint;
mod content_hash;
pub mod convert;
mod error;
pub mod files;
mod fuse_experts;
mod fused_experts;
pub mod gguf;
mod header;
mod hub_snapshot;
mod interrupt;
mod lock;
#[cfg(feature = "logging")]
pub mod logging;
mod manifest;
mod ordered_map;
mod output_dir;
mod parser_message;
mod platform;
mod precision;
pub mod problem;
mod profile;
mod safetensors_file;
pub mod seed;
mod source;
mod writer;

pub use adapter::{Adapter, AdapterModule, LayerKind, write_adapter, write_adapter_with_files};
pub use adapter_config::{AdapterConfig, TargetModules, alpha_for, lora_scaling, module_pattern, target_names};
pub use beside::{Beside, BesideKind};
pub use checkpoint::Checkpoint;
pub use error::Error;
pub use fuse_experts::BaseExperts;
pub use hub_snapshot::HubSnapshot;
pub use interrupt::Interrupt;
pub use lock::FileLock;
pub use manifest::{FileEntry, Manifest, ManifestProblem, Source, Tool, hash_file};
pub use output_dir::{OutputDir, refuse_overlap};
pub use precision::Precision;
pub use profile::Profile;
pub use safetensors::Dtype;
pub use safetensors_file::SafetensorsFile;
pub use source::{TensorInfo, TensorSource, TensorSpec};
pub use writer::{CheckpointWriter, WriteOptions, write_safetensors};
