#![doc = include_str!("../README.md")]

mod bootstrap;
mod chat;
#[cfg(feature = "cli")]
pub mod cli;
mod compare;
mod described;
mod error;
mod evaluate;
mod few_shot;
mod generation;
mod group;
mod lm_eval;
mod matrix;
mod mcnemar;
mod metric;
pub mod metrics;
mod multiple_choice;
pub mod paper;
mod registry;
mod request;
mod response_cache;
mod results;
mod rows;
mod table;
mod task;
mod task_file;
mod template;

pub use bootstrap::{Estimate, Resampling, paired_difference};
pub use chat::{ChatRender, Message, Role};
pub use compare::{Comparison, Means, MetricComparison, TaskComparison, compare, prediction_files};
pub use error::Error;
pub use evaluate::{Open, Prediction, Scores, evaluate, evaluate_all, rescore, score_file};
pub use generation::{Document, GenerationTask};
pub use group::{TaskGroup, aggregate_group};
pub use lm_eval::{Samples, find_lm_eval, lm_eval_samples};
pub use matrix::{Column, Group, ScoreMatrix, mean_of_percentages, ratio_of_means};
pub use mcnemar::{McNemar, mcnemar};
pub use metric::Metric;
pub use multiple_choice::{MultipleChoice, Question};
pub use registry::{TaskOptions, TaskSet, TaskSpec, known_tasks, load_task, load_tasks};
pub use request::{Answered, BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest};
pub use response_cache::{Answer, ResponseCache, TokenRequest};
pub use results::{GroupResult, RunSettings, TaskResult, harness_metric, results, write_results};
pub use table::{Table, summary_table, table_of};
pub use task::{Harness, Request, Response, Target, Task};
