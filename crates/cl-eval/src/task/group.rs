//! Groups of tasks.

use serde::Serialize;

/// Tasks that are scored as one, weighted by size, such as MMLU's subjects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TaskGroup {
    /// Name of the group.
    pub name: String,
    /// Version of the group, as in lm-evaluation-harness.
    pub version: u32,
    /// Names of its tasks.
    pub members: Vec<String>,
}
