//! Tasks: documents, the request each makes, and the target its answer is scored against.

mod chat;
mod described;
mod few_shot;
mod generation;
mod group;
mod lm_eval;
mod multiple_choice;
mod options;
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

/// The evaluation script that a task's published scores come from. Besides prompts, the scripts differ in tokenization:
/// in the paper, TRACE's tasks are tokenized as in training, with BOS; those of lm-evaluation-harness without BOS, its
/// default at the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Harness {
    /// lm-evaluation-harness.
    LmEval,
    /// TRACE.
    Trace,
    /// Neither.
    #[default]
    Other,
}

/// A list of documents, each with a request to the model and a target that the answer is scored against.
pub trait Task: Sync {
    /// Name of the task, as in tables.
    fn name(&self) -> &str;

    /// Number of documents.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of documents without a limit, of which [`Task::len`] are scored.
    fn available(&self) -> usize {
        self.len()
    }

    /// The request for a document, whose index is below [`Task::len`].
    fn request(&self, document: usize) -> Request;

    /// The target for a document.
    fn target(&self, document: usize) -> Target;

    /// The metric that answers are scored by.
    fn metric(&self) -> Metric;

    /// The script that the task's published scores come from.
    fn harness(&self) -> Harness {
        Harness::Other
    }

    /// Settings to save with results: number of few-shot examples, seed, files and their hashes.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }
}
