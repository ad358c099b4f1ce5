//! The description of a merge: settings, checked and resolved for every tensor.

pub(crate) mod check;
pub(crate) mod config;
pub(crate) mod error;
mod file;
mod mergekit;
pub(crate) mod parameter;
pub(crate) mod places;
pub(crate) mod registry;
pub(crate) mod settings;
pub(crate) mod tokenizer;
