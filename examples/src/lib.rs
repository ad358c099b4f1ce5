//! The examples are beside this folder: `cargo run -p cl-examples --example sequential_replay`.
