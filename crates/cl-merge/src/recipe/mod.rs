//! Merge files: settings, their checks, and their resolution for each tensor.

pub(crate) mod check;
pub(crate) mod config;
pub(crate) mod error;
mod file;
pub(crate) mod mergekit;
pub(crate) mod parameter;
pub(crate) mod places;
pub(crate) mod registry;
pub(crate) mod settings;
pub(crate) mod tokenizer;
