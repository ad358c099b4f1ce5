#![doc = include_str!("../README.md")]

mod check;
mod check_directory;
mod check_model;
mod check_routers;
mod columns;
mod config;
mod error;
mod findings;
mod kept;
mod memory;
mod model_dir;
mod observe;
mod output;
mod perplexity;
pub mod problem;
mod read_config;
mod report;
mod round;
mod round_data;
mod rounds;
mod router_config;
mod router_round;
mod router_states;
mod routing;
mod routing_heat_map;
mod scoring;
mod scoring_ranks;
mod sequence;
mod shape;
mod sources;
mod study;
mod task_routing;
pub mod toy;
mod train_run;
mod trained;
mod validation;

pub use check::{check_router, check_sequence, check_train};
pub use check_directory::check_directory;
pub use cl_data::{Buffer, Joint, Mixture, Replay};
pub use cl_train::{Keep, ValidationConfig};
pub use config::{DataConfig, EvalConfig, Limits, MixtureConfig, RoundConfig, SequenceConfig, TrainRun};
pub use error::LabError;
pub use findings::Finding;
pub use memory::{Gpus, MemoryPlan, StageMemory};
pub use model_dir::ModelRef;
pub use observe::{Event, Observer};
pub use perplexity::{Perplexity, PerplexityOptions, TextPerplexity, perplexity};
pub use read_config::{read_sequence, read_study, read_train};
pub use report::{method_name, tables_of};
pub use round::{RoundInput, RoundOutput, RoundValidation, run_round};
pub use round_data::load_train_data;
pub use rounds::Round;
pub use router_config::{RouterRun, read_router};
pub use router_round::{RouterOutput, run_train_router};
pub use router_states::router_states;
pub use routing::{RouterReport, Routing, RoutingReport, TaskRouting};
pub use scoring::{LoadedModel, add_bos_token, score_model, score_model_on, write_scores};
pub use sequence::{SequenceReport, run_sequence, run_sequence_on};
pub use study::{
    ColumnConfig, Comparison, OloraComparison, PAPER_STUDY, PlannedStage, SMOL_STUDY, SetSize, StageError, StudyConfig,
    StudyEvent, StudyOptions, StudyPlan, StudySizes, TinyConfig, ZeroStage, plan_study, run_study, sketch_study,
};
pub use task_routing::{AdapterShare, route_task};
pub use train_run::{finish_train_on, run_train, run_train_on};
