#![doc = include_str!("../README.md")]

mod error;
mod figures;
mod findings;
mod format;
mod methods;
mod page;
mod paper;
mod png;
mod read;
mod results;
mod section;
mod study;
mod svg;
mod table;
mod tables;
mod write;

pub use error::Error;
pub use findings::{Finding, Verdict, findings};
pub use read::Run;
pub use results::{Column, ResultRow, RowKind, StudyResults};
pub use write::{Written, check_place, write};
