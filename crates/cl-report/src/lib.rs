//! Reports of continual-learning studies.

mod error;
mod results;

pub use error::Error;
pub use results::{Column, ResultRow, RowKind, StudyResults};
