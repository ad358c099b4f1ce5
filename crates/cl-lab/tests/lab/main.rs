//! Rounds, sequences and studies on small models and data, run within the test process.

mod blend;
mod check_and_run;
mod kept;
mod moe;
mod olora;
mod perplexity;
mod round;
mod rounds;
mod router;
mod scoring;
mod sequence;
mod study;
mod world;
