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
        /// Number of messages at the start that are only context: the loss covers none of them, not even the
        /// assistant's.
        #[serde(default, skip_serializing_if = "is_zero")]
        context: usize,
    },
}

impl Example {
    /// Creates an example from a prompt and an answer.
    pub fn pair(prompt: impl Into<String>, answer: impl Into<String>) -> Example {
        Example::Pair { prompt: prompt.into(), answer: answer.into() }
    }

    /// Creates an example whose loss covers all of the assistant's messages.
    pub fn chat(messages: impl Into<Vec<Message>>) -> Example {
        Example::Chat { messages: messages.into(), context: 0 }
    }

    /// Whether no answer that the loss covers has any text. At most end tokens are then trained.
    pub fn is_empty(&self) -> bool {
        match self {
            Example::Pair { answer, .. } => answer.trim().is_empty(),
            Example::Chat { messages, context } => {
                messages.iter().skip(*context).all(|m| m.role != "assistant" || m.content.trim().is_empty())
            }
        }
    }

    /// The text before the last answer: the prompt, or the earlier messages, concatenated.
    pub fn shown(&self) -> String {
        match self {
            Example::Pair { prompt, .. } => prompt.clone(),
            Example::Chat { messages, .. } => {
                let end = messages.iter().rposition(|m| m.role == "assistant").unwrap_or(messages.len());
                messages[..end].iter().map(|m| format!("{}: {}\n", m.role, m.content)).collect()
            }
        }
    }

    /// The last answer.
    pub fn answer(&self) -> &str {
        match self {
            Example::Pair { answer, .. } => answer,
            Example::Chat { messages, .. } => {
                messages.iter().rfind(|m| m.role == "assistant").map_or("", |m| m.content.as_str())
            }
        }
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_example_reads_back_and_rows_without_context_do_not_mention_it() {
        let messages = vec![Message::new("user", "q"), Message::new("assistant", "a")];
        let whole = Example::chat(messages.clone());
        let json = serde_json::to_string(&whole).unwrap();
        assert!(!json.contains("context"), "{json}");
        for example in [whole, Example::Chat { messages, context: 1 }, Example::pair("p", "a")] {
            let json = serde_json::to_string(&example).unwrap();
            assert_eq!(serde_json::from_str::<Example>(&json).unwrap(), example);
        }
    }
}
