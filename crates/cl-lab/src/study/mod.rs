//! Studies: the paper's comparison as a graph of stages over one base model.
//!
//! Each stage produces and scores one result: the base, a sequence of rounds, a merge or a mixture. Its cache key is a
//! hash of everything that the result depends on. Completed stages with the same key are reused, so an interrupted
//! study can be resumed, and after a change of the configuration only the affected stages run again.

mod board;
mod config;
mod directory;
mod graph;
mod key;
mod mixtures;
mod plan;
mod results;
mod run;
mod tiny;
mod work;

/// The study of SmolLM2-135M on TRACE and GSM8K: `profiles/smol.toml`, which `examples/configs` links to.
pub const SMOL_STUDY: &str = include_str!("profiles/smol.toml");
/// The paper's comparison: `profiles/paper.toml`, which `examples/configs` links to.
pub const PAPER_STUDY: &str = include_str!("profiles/paper.toml");

pub use config::{ColumnConfig, Comparison, OloraComparison, StudyConfig};
pub use plan::{PlannedStage, SetSize, StudyPlan, StudySizes, ZeroStage, sketch_study};
pub use run::{StageError, StudyEvent, StudyOptions, plan_study, run_study};
pub use tiny::TinyConfig;
