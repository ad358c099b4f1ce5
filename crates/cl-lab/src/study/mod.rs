//! A study: the paper's comparison as a graph of stages over one base model.
//!
//! A stage produces and scores something: the base, a sequence of rounds, a merge, a mixture. Each stage has a key, a
//! hash of everything that its result depends on. Completed stages with the same key are reused, so that an interrupted
//! study continues, and after a change of the configuration only the affected stages run again.

mod board;
mod config;
mod directory;
mod graph;
mod mixtures;
mod plan;
mod results;
mod run;
mod tiny;
mod work;

/// The study of SmolLM2-135M on TRACE and GSM8K: `profiles/smol.toml`, to which `examples/configs` links.
pub const SMOL_STUDY: &str = include_str!("profiles/smol.toml");
/// The paper's comparison: `profiles/paper.toml`, to which `examples/configs` links.
pub const PAPER_STUDY: &str = include_str!("profiles/paper.toml");

pub use config::{ColumnConfig, Comparison, OloraComparison, StudyConfig};
pub use plan::{PlannedStage, SetSize, StudyPlan, StudySizes, ZeroStage, sketch_study};
pub use run::{StageError, StudyEvent, StudyOptions, plan_study, run_study};
pub use tiny::TinyConfig;
