//! The examples are in the parent directory: `cargo run -p cl-examples --example sequential_replay`.

/// Compiles and runs the library example of the repository's README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
