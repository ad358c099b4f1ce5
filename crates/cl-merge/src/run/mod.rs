//! A plan run in bounded memory, and what its output says of itself.

pub(crate) mod budget;
pub(crate) mod engine;
pub(crate) mod estimate;
pub(crate) mod options;
pub(crate) mod provenance;
pub(crate) mod stages;
