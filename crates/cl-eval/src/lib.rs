#![doc = include_str!("../README.md")]

mod chat;
mod described;
mod error;
mod evaluate;
mod few_shot;
mod generation;
mod group;
mod matrix;
mod metric;
pub mod metrics;
mod multiple_choice;
pub mod paper;
mod registry;
mod request;
mod rows;
mod table;
mod task;
mod task_file;
mod template;

pub use chat::{ChatRender, Message, Role};
pub use error::Error;
pub use evaluate::{Open, Prediction, Scores, evaluate, evaluate_all, rescore, score_file};
pub use generation::{Document, GenerationTask};
pub use group::{TaskGroup, aggregate_group};
pub use matrix::{Column, Group, ScoreMatrix, mean_of_percentages, ratio_of_means};
pub use metric::Metric;
pub use multiple_choice::{MultipleChoice, Question};
pub use registry::{TaskOptions, TaskSet, TaskSpec, known_tasks, load_task, load_tasks};
pub use request::{Answered, BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest};
pub use table::{Table, summary_table, table_of};
pub use task::{Request, Response, Target, Task};
