//! Causes of a [`LabError`](crate::LabError), as data; the error itself adds where the problem occurred.
//!
//! ```
//! use cl_lab::problem::{ConfigProblem, RoundsProblem};
//! use cl_lab::{LabError, read_sequence};
//!
//! let text = "model = 'm'\ndata = 'd'\ntasks = ['news', 'law', 'news']\n[train.lora]\nr = 8\n";
//! let Err(LabError::Config { problem, .. }) = read_sequence("run.toml".as_ref(), text, &[]) else { panic!("it was read") };
//! assert_eq!(problem.to_string(), "tasks: `news` occurs again as entry 3");
//! assert!(matches!(problem, ConfigProblem::Rounds(RoundsProblem::Twice { entry: 3, .. })));
//! ```

mod config;
mod output;
mod rounds;
mod routers;
mod study;
mod task_name;

pub use config::{ConfigProblem, SetProblem};
pub use output::OutputProblem;
pub use rounds::{RoundProblem, RoundsProblem};
pub use routers::RoutersProblem;
pub use study::StudyProblem;
pub use task_name::TaskNameProblem;
