//! One tensor of several models: reading in pieces, selection of the largest entries, computation.

mod copy;
mod group;
mod held;
pub(crate) mod kernels;
mod keys;
mod random;
pub mod select;
pub(crate) mod trim;

pub(crate) use copy::copy_bytes;
pub use group::{PIECE, Piece, TensorGroup, Values};
pub(crate) use group::{READ, is_eight_bit, is_float, is_readable, runs};
pub(crate) use held::Buffers;
pub use random::Stream;
