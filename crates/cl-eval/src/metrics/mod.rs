//! Metrics, one per file, with their sources and pitfalls.
//!
//! Every metric is defined for any pair of texts.

pub(crate) mod choice;
pub mod edit;
pub mod exact;
mod filter;
pub mod first_char;
pub mod gsm8k;
mod metric;
mod python_regex;
pub mod rouge;
pub mod sari;
mod target;

pub use exact::ExactMatch;
pub use filter::{Filter, FilterPipeline};
pub use metric::Metric;
pub use python_regex::PythonRegex;
pub use target::{Gold, Target};

pub(crate) use cl_data::python::is_space as python_space;

/// Splits a text like Python's `str.split()`.
pub(crate) fn python_split(text: &str) -> impl Iterator<Item = &str> {
    text.split(python_space).filter(|w| !w.is_empty())
}

/// Strips a text like Python's `str.strip()`.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(python_space)
}
