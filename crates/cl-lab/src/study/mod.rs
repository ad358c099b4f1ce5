//! A study: everything that the paper compares, as a graph of stages over one base model.
//!
//! A stage is something that is made and scored: the base, a sequence of rounds, a merge, a mixture. It is keyed by everything
//! that its result depends on, and what is done is not done again: a study that was killed goes on, and one whose configuration
//! changed makes only what the change concerns.

mod config;
mod graph;
mod mixtures;
mod results;
mod run;
mod tiny;
mod work;

pub use config::{ColumnConfig, Comparison, OloraComparison, StudyConfig};
pub use run::{StageError, StudyEvent, StudyOptions, StudyPlan, plan_study, run_study};
pub use tiny::TinyConfig;
