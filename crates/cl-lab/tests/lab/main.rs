//! Rounds, sequences and the study on a small world of models and data, without a process in between.

mod blend;
mod check_and_run;
mod moe;
mod olora;
mod round;
mod rounds;
mod router;
mod scoring;
mod sequence;
mod study;
mod world;
