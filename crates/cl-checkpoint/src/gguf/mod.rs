//! GGUF files, and their import into Hugging Face directories.
//!
//! The format: magic `GGUF`, version 2 or 3, counts, key-value pairs, tensor descriptions, then aligned tensor data; all
//! little endian. Dimensions are stored innermost first.

mod config;
mod dequantize;
mod import;
mod reader;
mod tokenizer;

pub use dequantize::{GgmlType, dequantize};
pub use import::{ImportOptions, ImportReport, import};
pub use reader::{GgufFile, GgufTensor, GgufValue};
