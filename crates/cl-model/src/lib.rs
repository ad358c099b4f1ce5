#![doc = include_str!("../README.md")]

mod attention;
mod batch;
mod build;
mod config;
mod continuous;
mod decoder;
mod delta;
mod encoder;
mod error;
mod feed_forward;
mod generate;
mod generation;
mod kv_cache;
mod language_model;
mod layer;
mod load;
mod lookup;
mod loss;
mod mixture;
mod norm;
mod prefix_tree;
pub mod problem;
mod projection;
mod quantized;
mod random;
mod rope;
mod router_loss;
mod routing;
mod row_cache;
mod sampling;
mod save;
mod score;
mod session;
mod text_stream;
mod tree_attention;

pub use batch::PackedBatch;
pub use config::{
    Activation, ExpertGating, ExpertLayout, ExpertModule, Experts, Family, ModelConfig, NormPlacement, QkNorm,
    RopeScaling,
};
pub use decoder::{Decoder, LayerHooks};
pub use error::ModelError;
pub use generate::{generate, generate_each, greedy};
pub use generation::{Batching, GenerateOptions, Generation, Receiver};
pub use language_model::Scorer;
pub use load::LoadOptions;
pub use loss::{SupervisedLoss, supervised_loss};
pub use quantized::{check_continued, check_trained, is_quantizable};
pub use random::random_weights;
pub use router_loss::{RouterLosses, router_losses};
pub use sampling::{Decoding, Sampling};
pub use score::{log_probs_from, token_log_probs};
pub use session::Session;
pub use text_stream::TextStream;
