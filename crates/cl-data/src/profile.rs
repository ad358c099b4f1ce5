use serde::{Deserialize, Serialize};

/// Whose semantics hold where a paper's code differs from the method it describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// What "Collaboratively adding new knowledge to an LLM" was computed with.
    Paper,
    /// What the method's own authors describe.
    #[default]
    Method,
}

impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Profile::Paper => "paper",
            Profile::Method => "method",
        })
    }
}
