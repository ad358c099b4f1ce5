use std::path::Path;

use cl_data::{Hub, Profile};

use super::chat::ChatRender;
use crate::metrics::Metric;

/// How a task is loaded.
#[derive(Clone, Copy, Default)]
pub struct TaskOptions<'a> {
    /// Only the first so many documents of each task.
    pub limit: Option<usize>,
    /// Instead of the task's own.
    pub max_new_tokens: Option<usize>,
    /// Instead of the task's own; `exact_match` for a directory that is not a known task.
    pub metric: Option<Metric>,
    /// Solved documents in front of each, instead of the task's own number.
    pub num_fewshot: Option<usize>,
    /// Seed that shots are drawn with; 1234 if there is none.
    pub fewshot_seed: Option<u32>,
    /// A chat template: prompts are conversations, and a choice follows without a space.
    pub chat: Option<&'a dyn ChatRender>,
    /// With a chat template: every shot is a turn of the user's and one of the model's, instead of one message with
    /// all.
    pub fewshot_as_multiturn: bool,
    /// Stands in front of the task's own description.
    pub system_instruction: Option<&'a str>,
    /// Under [`Profile::Paper`] a task of ROUGE-L stands in tables by the paper's own number.
    pub profile: Profile,
    /// An installed lm-eval, or a task's file of it, for shots that it alone publishes; see [`find_lm_eval`](crate::find_lm_eval).
    pub lm_eval: Option<&'a Path>,
    /// Where data sets are fetched from that are not in the directory; nothing is ever fetched without it.
    pub hub: Option<&'a Hub>,
}
