//! What is wrong with mixtures, as facts in fields; an [`Error`](crate::Error) adds where.

mod mixture;

pub use mixture::MixtureProblem;
