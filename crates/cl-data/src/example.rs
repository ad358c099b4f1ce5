use serde::{Deserialize, Serialize};

use crate::Message;

/// One row of training data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Example {
    /// A text that is shown and a text that should follow; both verbatim.
    Pair {
        /// Shown; not learned.
        prompt: String,
        /// Learned, with the end token behind it.
        answer: String,
    },
    /// A conversation, which the model's chat template writes; what the assistant says is learned.
    Chat {
        /// Its turns.
        messages: Vec<Message>,
    },
}

impl Example {
    /// A prompt and its answer.
    pub fn pair(prompt: impl Into<String>, answer: impl Into<String>) -> Example {
        Example::Pair { prompt: prompt.into(), answer: answer.into() }
    }

    /// Whether there is nothing in it to learn but an end token.
    pub fn is_empty(&self) -> bool {
        match self {
            Example::Pair { answer, .. } => answer.trim().is_empty(),
            Example::Chat { messages } => messages.iter().all(|m| m.role != "assistant" || m.content.trim().is_empty()),
        }
    }

    /// What is shown before the last answer: the prompt, or the turns before it one after another.
    pub fn shown(&self) -> String {
        match self {
            Example::Pair { prompt, .. } => prompt.clone(),
            Example::Chat { messages } => {
                let end = messages.iter().rposition(|m| m.role == "assistant").unwrap_or(messages.len());
                messages[..end].iter().map(|m| format!("{}: {}\n", m.role, m.content)).collect()
            }
        }
    }

    /// The last answer.
    pub fn answer(&self) -> &str {
        match self {
            Example::Pair { answer, .. } => answer,
            Example::Chat { messages } => {
                messages.iter().rfind(|m| m.role == "assistant").map_or("", |m| m.content.as_str())
            }
        }
    }
}
