//! Tasks: documents, the request for each, and the target that its answer is scored against.

mod chat;
mod described;
mod few_shot;
mod generation;
mod group;
mod harness_file;
mod lm_eval;
mod multiple_choice;
mod options;
mod python_list;
mod registry;
mod rows;
mod task_file;
mod template;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::metrics::{Metric, Target};
use crate::request::Request;

pub use chat::{ChatRender, Message};
pub use cl_data::Role;
pub use generation::{Document, GenerationTask};
pub use group::TaskGroup;
pub use lm_eval::{Samples, find_lm_eval, lm_eval_samples};
pub use multiple_choice::{MultipleChoice, Question};
pub use options::TaskOptions;
pub use registry::{TaskSet, TaskSpec, known_tasks, load_task, load_tasks};
pub use rows::task_homes;

/// The evaluation script that a task's published scores were computed with. Besides prompts, the scripts differ in
/// tokenization: in the paper, TRACE's tasks are tokenized as in training, with BOS; those of lm-evaluation-harness
/// without BOS, its default at the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Harness {
    /// lm-evaluation-harness.
    LmEval,
    /// TRACE.
    Trace,
    /// Any other script.
    #[default]
    Other,
}

/// A list of documents, each with a request to the model and a target that the answer is scored against.
pub trait Task: Sync {
    /// Returns the name of the task, as shown in tables.
    fn name(&self) -> &str;

    /// Returns the number of documents.
    fn len(&self) -> usize;

    /// Whether there are no documents.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of documents before applying the limit; [`Task::len`] of them are scored.
    fn available(&self) -> usize {
        self.len()
    }

    /// Returns the request for a document, whose index is below [`Task::len`].
    fn request(&self, document: usize) -> Request;

    /// Returns the target for a document.
    fn target(&self, document: usize) -> Target;

    /// Returns the metric used to score answers.
    fn metric(&self) -> Metric;

    /// Returns the script that the task's published scores were computed with.
    fn harness(&self) -> Harness {
        Harness::Other
    }

    /// Returns settings to save with results: number of few-shot examples, seed, files and their hashes.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }
}
