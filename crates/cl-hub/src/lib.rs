#![doc = include_str!("../README.md")]

#[cfg(feature = "cli")]
mod args;
mod cache;
mod error;
mod http;
mod hub;
mod model;
mod names;
mod repo;
mod revision;

#[cfg(feature = "cli")]
pub use args::HubArgs;
pub use error::HubError;
pub use hub::Hub;
pub use model::{Download, Part, Snapshot};
pub use names::{Located, Names};
pub use repo::{Repo, RepoKind, check_name};
pub use revision::{RepoFile, Revision};
