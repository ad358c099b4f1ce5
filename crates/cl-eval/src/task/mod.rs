//! Tasks: documents, how each is asked about, and what its answer is held against.

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

pub use chat::{ChatRender, Message, Role};
pub use generation::{Document, GenerationTask};
pub use group::TaskGroup;
pub use lm_eval::{Samples, find_lm_eval, lm_eval_samples};
pub use multiple_choice::{MultipleChoice, Question};
pub use options::TaskOptions;
pub use registry::{TaskSet, TaskSpec, known_tasks, load_task, load_tasks};

/// Whose script a task's published scores come from. In the paper the two differ in more than prompts: TRACE's tasks are
/// tokenized as training does, BOS included; those of lm-evaluation-harness without BOS, which was its default then.
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

/// Documents with a way to ask about each and to score the answer.
pub trait Task: Sync {
    /// Name, as in tables.
    fn name(&self) -> &str;

    /// Number of documents.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What to ask about a document (from 0, below [`Task::len`]).
    fn request(&self, document: usize) -> Request;

    /// What its answer is held against.
    fn target(&self, document: usize) -> Target;

    /// How answers are scored.
    fn metric(&self) -> Metric;

    /// Whose script its published scores come from.
    fn harness(&self) -> Harness {
        Harness::Other
    }

    /// How its documents were asked about, as it is recorded with results: shots, seed, files and their hashes.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }
}
