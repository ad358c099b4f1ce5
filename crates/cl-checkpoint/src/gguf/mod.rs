//! GGUF files, and their import to Hugging Face model directories.
//!
//! The format: magic `GGUF`, version 2 or 3, counts, key-value pairs, tensor descriptions, then aligned tensor data;
//! all little endian. Dimensions are stored innermost first.

mod config;
mod dequant;
mod dtype;
mod error;
mod import;
mod keys;
mod problem;
mod reader;
mod rope;
mod tensors;
mod tokenizer;

pub use dequant::{GgmlType, dequantize};
pub use dtype::{FloatDtype, UnknownDtype};
pub use error::Error;
pub use import::{ImportOptions, ImportReport, import};
pub use problem::{HeaderItem, HeaderProblem, KeyProblem, TensorProblem};
pub use reader::{GgufFile, GgufTensor, GgufValue};
