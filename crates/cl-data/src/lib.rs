#![doc = include_str!("../README.md")]

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
mod parquet_limits;
mod profile;
pub mod python;
mod row_plan;
mod rows;
mod shard;
mod special;
pub mod template;
mod tokenizer;

pub use chat::{ChatTemplate, Message, Role};
pub use dataset::{Dataset, Example, Format, Split, load, load_split};
pub use encode::{Encoded, encode_dataset, encode_example};
pub use error::Error;
pub use hub::{DatasetRef, Hub, HubError};
pub use inspect::{DataReport, Found, Prompts, inspect};
pub use lines::{BOM, Line, Lines, MAX_LINE, read_lines};
pub use mixture::{Mixture, RowRef, Upsampling, epoch_rows, plan, shuffled};
pub use pack::{Packed, pack};
pub use profile::Profile;
pub use row_plan::{PlannedSet, RowPlan, UsedRow};
pub use rows::{Row, RowFile, read_rows};
pub use shard::shard;
pub use tokenizer::Tokenizer;
