//! What is wrong with data, as structured values; an [`Error`](crate::Error) adds where.
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! use cl_data::problem::RowProblem;
//! use cl_data::{Error, Format, load};
//!
//! let path = folder.path().join("train.jsonl");
//! std::fs::write(&path, "{\"prompt\": \"1+1?\", \"answer\": 2}\n")?;
//! let Err(Error::Row { row, problem, .. }) = load(&path, Format::Auto) else { panic!("it was loaded") };
//! let RowProblem::NotText { key, found } = &*problem else { panic!("{problem}") };
//! assert_eq!((row, key.as_str(), *found), (0, "answer", "a number"));
//! assert_eq!(problem.to_string(), "`answer` is a number, expected text; [data.columns] accepts numbers, too");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod chat;
mod columns;
mod form;
mod mixture;
mod parquet;
mod row;
mod row_plan;

pub use chat::ChatProblem;
pub use columns::ColumnsProblem;
pub use form::FormProblem;
pub use mixture::MixtureProblem;
pub use parquet::ParquetProblem;
pub use row::RowProblem;
pub use row_plan::RowPlanProblem;
