use serde::{Deserialize, Serialize};

use crate::Message;

/// One row of training data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Example {
    /// A prompt and its answer, both verbatim.
    Pair {
        /// The prompt, which is not part of the loss.
        prompt: String,
        /// The answer, which is part of the loss together with the EOS token that follows it.
        answer: String,
    },
    /// A conversation, rendered by the model's chat template. The loss covers the assistant's messages.
    Chat {
        /// The messages.
        messages: Vec<Message>,
    },
}

impl Example {
    /// Creates an example from a prompt and an answer.
    pub fn pair(prompt: impl Into<String>, answer: impl Into<String>) -> Example {
        Example::Pair { prompt: prompt.into(), answer: answer.into() }
    }

    /// Whether the loss covers nothing but an end token.
    pub fn is_empty(&self) -> bool {
        match self {
            Example::Pair { answer, .. } => answer.trim().is_empty(),
            Example::Chat { messages } => messages.iter().all(|m| m.role != "assistant" || m.content.trim().is_empty()),
        }
    }

    /// The text before the last answer: the prompt, or the earlier messages, concatenated.
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
