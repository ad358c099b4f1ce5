//! A study: everything that the paper compares, as a graph of stages over one base model.
//!
//! A stage is something that is made and scored: the base, a sequence of rounds, a merge, a mixture. It is keyed by everything
//! that its result depends on, and what is done is not done again: a study that was killed goes on, and one whose configuration
//! changed makes only what the change concerns.

mod config;
mod graph;
mod mixtures;
mod plan;
mod results;
mod run;
mod tiny;
mod work;

/// The study of SmolLM2-135M on TRACE and GSM8K: `profiles/smol.toml`, which `examples/configs` links to.
pub const SMOL_STUDY: &str = include_str!("profiles/smol.toml");
/// The paper's own comparison: `profiles/paper.toml`, which `examples/configs` links to.
pub const PAPER_STUDY: &str = include_str!("profiles/paper.toml");

pub use config::{ColumnConfig, Comparison, OloraComparison, StudyConfig};
pub use plan::{PlannedStage, SetSize, StudyPlan, StudySizes, sketch_study};
pub use run::{StageError, StudyEvent, StudyOptions, plan_study, run_study};
pub use tiny::TinyConfig;
