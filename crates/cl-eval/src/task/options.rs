use std::path::Path;

use cl_data::{Hub, Profile};

use super::chat::ChatRender;
use crate::metrics::Metric;

/// Options for loading a task.
#[derive(Clone, Copy, Default)]
pub struct TaskOptions<'a> {
    /// Maximum number of documents per task.
    pub limit: Option<usize>,
    /// Maximum total number of documents of a group, divided evenly among its tasks and rounded up; without it, `limit`
    /// applies to each task.
    pub group_limit: Option<usize>,
    /// Maximum number of new tokens; defaults to the task's.
    pub max_new_tokens: Option<usize>,
    /// Upper bound for the number of new tokens, for tasks that would generate more.
    pub most_new_tokens: Option<usize>,
    /// Metric of tasks of its kind (multiple choice, continuations or generated answers); others keep theirs. Defaults to
    /// the task's, and to `exact_match` for a directory that is not a known task.
    pub metric: Option<Metric>,
    /// Number of few-shot examples; defaults to the task's.
    pub num_fewshot: Option<usize>,
    /// Random seed for drawing few-shot examples; defaults to 1234.
    pub fewshot_seed: Option<u32>,
    /// Chat template for prompts. Choices then have no leading space.
    pub chat: Option<&'a dyn ChatRender>,
    /// With a chat template: each few-shot example is a user message and an assistant message, instead of all examples
    /// being part of one user message.
    pub fewshot_as_multiturn: bool,
    /// System instruction, placed before the task's description.
    pub system_instruction: Option<&'a str>,
    /// Profile: which set of definitions applies. With [`Profile::Paper`], the main metric of ROUGE-L tasks is the
    /// paper's variant.
    pub profile: Profile,
    /// An installed lm-eval, for few-shot examples that only it publishes; see [`find_lm_eval`](crate::find_lm_eval).
    pub lm_eval: Option<&'a Path>,
    /// Hub from which to download data sets that are not in the directory. Without it, nothing is downloaded.
    pub hub: Option<&'a Hub>,
}
