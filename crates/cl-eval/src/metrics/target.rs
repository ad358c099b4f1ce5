use serde::{Deserialize, Serialize};

/// The target that an answer is scored against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// Multiple choice.
    Choice {
        /// The choices without the leading space; `acc_norm` divides by their lengths.
        choices: Vec<String>,
        /// Index of the correct choice.
        gold: usize,
    },
    /// A reference answer.
    Reference {
        /// The text.
        reference: String,
        /// Source text, for SARI.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<String>,
    },
}
