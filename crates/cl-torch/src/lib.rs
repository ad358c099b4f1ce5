#![doc = include_str!("../README.md")]
#![allow(unsafe_code)] // the interface to libtorch: raw tensor pointers and dlopen; each unsafe block states its reason

mod attention;
mod autograd;
mod checkpointing;
mod cuda;
mod elementwise;
mod error;
mod ffi;
mod kv_blocks;
mod linear;
mod memory;
mod optimizer;
mod process_group;
mod products;
mod quantized;
mod rendezvous;
mod tensor_bytes;
#[cfg(test)]
mod testing;
mod threads;

pub use attention::{flash_varlen, packed_attention};
pub use autograd::{backward, grad, set_gradient};
pub use checkpointing::{Around, checkpoint, checkpoint_around, on_backward};
pub use cuda::{load_cuda, pick_device};
pub use elementwise::{rms_norm, rotate, silu_mul};
pub use error::TorchError;
pub use kv_blocks::{Continuation, KvBlocks, ScoreRule};
pub use linear::{LinearLayer, LinearWeight, LowRank, linear, linears};
pub use memory::{give_memory_back, release_memory};
pub use optimizer::{AdamW, foreach_mul_, fused_adamw, global_norm};
pub use process_group::{Pending, ProcessGroup};
pub use products::{Products, emulates_bf16, products, use_products};
pub use quantized::{Quantization, Quantized};
pub use rendezvous::Rendezvous;
pub use tch;
pub use tensor_bytes::{kind, kind_of, load_tensor, tensor_bytes};
pub use threads::{set_threads, watch_load};
