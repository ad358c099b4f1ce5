use serde::{Deserialize, Serialize};

use super::exact::ExactMatch;

/// The target that an answer is scored against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// Multiple choice.
    Choice {
        /// The choices without the leading space; `acc_norm` divides by their lengths.
        choices: Vec<String>,
        /// The correct choice.
        gold: Gold,
    },
    /// A reference answer.
    Reference {
        /// The text.
        reference: String,
        /// Source text, for SARI.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<String>,
    },
    /// Reference answers of which any is right, and how answers are compared with them.
    Answers {
        /// The texts; at least one.
        answers: Vec<String>,
        /// Filters and options of the comparison. Metrics other than `exact_match` compare the first text and ignore
        /// them.
        exact_match: ExactMatch,
    },
    /// A text that greedy decoding should produce.
    Continuation {
        /// The text.
        continuation: String,
    },
}

/// The correct choice of a question, or several: an index or a list of indices in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Gold {
    /// Index of the correct choice.
    One(usize),
    /// Indices of the correct choices, in order.
    Several(Vec<usize>),
}

impl Gold {
    /// Returns the indices of the correct choices.
    pub fn indices(&self) -> &[usize] {
        match self {
            Gold::One(index) => std::slice::from_ref(index),
            Gold::Several(indices) => indices,
        }
    }

    /// Returns the index of the first correct choice; 0 if there is none.
    pub(crate) fn first(&self) -> usize {
        self.indices().first().copied().unwrap_or(0)
    }
}
