use serde::{Deserialize, Serialize};

/// What an answer is held against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// One of several continuations is right.
    Choice {
        /// The continuations as they are counted for `acc_norm`, without the space in front.
        choices: Vec<String>,
        /// Index of the right one.
        gold: usize,
    },
    /// What should have been written.
    Reference {
        /// The text.
        reference: String,
        /// What SARI compares the answer with.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<String>,
    },
}
