//! The examples are beside this folder: `cargo run --example sequential_replay`.
