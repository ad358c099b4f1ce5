#![doc = include_str!("../README.md")]

#[cfg(feature = "cli")]
mod args;
mod cache;
mod card;
mod error;
mod http;
mod hub;
mod model;
mod names;
pub mod problem;
mod publish;
mod repo;
mod revision;
mod upload;

#[cfg(feature = "cli")]
pub use args::HubArgs;
pub use card::{CardData, CardResult};
pub use error::HubError;
pub use hub::Hub;
pub use model::{Download, Part, Snapshot};
pub use names::{Located, Names};
pub use publish::{Publication, PublishOptions, publish};
pub use repo::{Repo, RepoKind, check_name};
pub use revision::{RepoFile, Revision};
pub use upload::{Content, Upload, Uploaded};
