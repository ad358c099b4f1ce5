//! Tasks that are scored as one.

use serde::Serialize;

/// Tasks whose documents count as those of one, such as MMLU's subjects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TaskGroup {
    /// Name, as in tables.
    pub name: String,
    /// Names of its tasks.
    pub members: Vec<String>,
}
