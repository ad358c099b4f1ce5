#![doc = include_str!("../README.md")]

mod error;
mod evaluate;
mod few_shot;
mod generation;
mod matrix;
pub mod metrics;
mod multiple_choice;
pub mod paper;
mod registry;
mod request;
mod table;
mod task;

pub use error::Error;
pub use evaluate::{Prediction, Scores, evaluate, rescore};
pub use generation::{Document, GenerationTask, Metric};
pub use matrix::{Column, Group, ScoreMatrix, mean_of_percentages, ratio_of_means};
pub use multiple_choice::{MultipleChoice, Question};
pub use registry::{TaskOptions, TaskSpec, known_tasks, load_task};
pub use request::{BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest};
pub use table::{Table, summary_table, table_of};
pub use task::{Request, Response, Task};
