use serde::{Deserialize, Serialize};

/// Which definitions apply where the paper's code differs from the methods that it cites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// Those that "Collaboratively adding new knowledge to an LLM" was computed with.
    Paper,
    /// Those of the methods' own authors.
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
