#![doc = include_str!("../README.md")]

#[cfg(feature = "cli")]
pub mod cli;
mod error;
mod matrix;
pub mod metrics;
pub mod problem;
mod request;
mod run;
mod stats;
mod task;

pub use error::Error;
pub use matrix::{
    Cell, Column, Group, MethodTable, ScoreMatrix, Table, mean_of_percentages, paper, ratio_of_means, summary_table,
    table_of,
};
pub use metrics::{Gold, Metric, Target};
pub use request::{
    Answered, BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest, Request, Response,
};
pub use run::{
    Answer, DEFAULT_BATCH_SEQUENCES, DEFAULT_BATCH_TOKENS, GroupResult, Observe, Open, Prediction, ResponseCache,
    RunSettings, Scores, TaskResult, TokenRequest, aggregate_group, evaluate, evaluate_all, harness_metric,
    method_table, rescore, results, score_file, write_results,
};
pub use stats::{
    Comparison, Estimate, McNemar, Means, MetricComparison, Resampling, TaskComparison, compare, mcnemar,
    paired_difference, prediction_files,
};
pub use task::{
    ChatRender, Document, GenerationTask, Harness, Message, MultipleChoice, Question, Role, Samples, Task, TaskGroup,
    TaskOptions, TaskSet, TaskSpec, find_lm_eval, known_tasks, lm_eval_samples, load_task, load_tasks, task_homes,
};
