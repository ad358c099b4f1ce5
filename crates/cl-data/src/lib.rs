#![doc = include_str!("../README.md")]

mod audit;
mod chat;
mod dataset;
mod encode;
mod error;
mod hub;
mod inspect;
pub mod jinja;
mod lines;
mod mixture;
pub mod numpy;
mod pack;
mod parquet_file;
mod profile;
pub mod python;
mod rows;
mod special;
pub mod template;
mod tokenizer;

pub use audit::{Audit, AuditRow, read_audit};
pub use chat::{ChatTemplate, Message};
pub use dataset::{Dataset, Example, Format, Split, load, load_split};
pub use encode::{Encoded, encode_dataset, encode_example};
pub use error::Error;
pub use hub::{DatasetRef, Hub, HubError};
pub use inspect::{DataReport, Found, Prompts, inspect};
pub use lines::{BOM, Line, Lines, MAX_LINE, read_lines};
pub use mixture::{Mixture, RowRef, Upsampling, epoch_rows, plan, shard, shuffled};
pub use pack::{Packed, pack};
pub use profile::Profile;
pub use rows::{Row, RowFile, read_rows};
pub use tokenizer::Tokenizer;
