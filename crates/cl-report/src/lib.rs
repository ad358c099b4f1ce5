#![doc = include_str!("../README.md")]

mod error;
mod figures;
mod findings;
mod format;
mod heat_map;
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
pub use heat_map::{HeatMap, Picture, draw_heat_maps};
pub use read::Run;
pub use results::{Column, ResultRow, Routing, RowKind, StudyResults, TaskRouting};
pub use write::{Written, check_place, write};
