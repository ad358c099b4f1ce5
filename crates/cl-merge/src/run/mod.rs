//! Execution of a plan in bounded memory, and the metadata of its output.

pub(crate) mod budget;
pub(crate) mod engine;
pub(crate) mod estimate;
pub(crate) mod options;
pub(crate) mod provenance;
pub(crate) mod stages;
