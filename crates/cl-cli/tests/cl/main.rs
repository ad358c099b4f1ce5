//! The command `cl` as a user runs it, in a directory with a small model and small tasks.

mod arguments;
mod chat;
mod check;
mod corrupted;
mod data;
mod engine;
mod eval;
mod generate;
mod gpu_check;
mod hub;
mod import;
mod interrupted;
mod killed;
mod moe;
mod ranks;
mod ranks_scoring;
mod report;
mod sampling;
mod sequence;
mod train;
mod validation;
mod words;
mod world;
