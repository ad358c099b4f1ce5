//! What is wrong with a checkpoint, as structured values; an [`Error`](crate::Error) adds where.
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! use cl_checkpoint::problem::HeaderProblem;
//! use cl_checkpoint::{Error, SafetensorsFile};
//!
//! let path = folder.path().join("model.safetensors");
//! std::fs::write(&path, "{}")?;
//! let Err(Error::Header { problem, .. }) = SafetensorsFile::open(&path) else { panic!("it was opened") };
//! assert!(matches!(problem, HeaderProblem::TooShort { bytes: 2 }));
//! assert_eq!(problem.to_string(), "2 bytes, but a header needs at least 8");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adapter;
mod header;
mod index;
mod obstacle;
mod plan;
mod tensor;

pub use adapter::AdapterProblem;
pub use header::HeaderProblem;
pub use index::IndexProblem;
pub use obstacle::Obstacle;
pub use plan::PlanProblem;
pub use tensor::TensorProblem;
