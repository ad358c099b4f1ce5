//! A prompt as turns of a conversation, and turns as one text: plainly, or by a model's chat template.
//!
//! As lm-eval 0.4.13 with `--apply_chat_template`, `--fewshot_as_multiturn` and `--system_instruction`.

use serde::{Deserialize, Serialize};

use crate::metrics::python_space;
use crate::request::BoxError;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// What holds for the whole conversation.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// A chat template: a conversation that ends with the user's turn becomes the text after which the model answers, with the
/// mark that begins its turn (`add_generation_prompt`).
///
/// Any function of the shape below is one.
pub trait ChatRender {
    /// The conversation as the model reads it.
    ///
    /// # Errors
    /// What the template says.
    fn render(&self, messages: &[Message]) -> Result<String, BoxError>;
}

impl<F: Fn(&[Message]) -> Result<String, BoxError>> ChatRender for F {
    fn render(&self, messages: &[Message]) -> Result<String, BoxError> {
        self(messages)
    }
}

/// A message and what stands behind it where there is no chat template.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    message: Message,
    delimiter: String,
}

impl Turn {
    pub(crate) fn new(role: Role, content: impl Into<String>, delimiter: &str) -> Turn {
        Turn { message: Message { role, content: content.into() }, delimiter: delimiter.to_owned() }
    }
}

/// How turns become one text.
#[derive(Clone, Copy)]
pub(crate) struct Chat<'a> {
    pub(crate) template: Option<&'a dyn ChatRender>,
    pub(crate) fewshot_as_multiturn: bool,
}

impl Chat<'_> {
    /// The prompt. Without a template the turns stand one behind the other, each with its delimiter. With one, every turn is a
    /// message of its own, or all but the system's are one message of the user's.
    pub(crate) fn text(self, turns: &[Turn]) -> Result<String, BoxError> {
        let Some(template) = self.template else { return Ok(plain(turns)) };
        let messages: Vec<Message> = if self.fewshot_as_multiturn {
            turns.iter().map(|t| t.message.clone()).collect()
        } else {
            let of_system = usize::from(turns.first().is_some_and(|t| t.message.role == Role::System));
            let (system, others) = turns.split_at(of_system);
            let content = plain(others);
            let last = others.last().map_or(0, |t| t.delimiter.len());
            let content = content[..content.len() - last].to_owned();
            let user = Message { role: Role::User, content };
            system.iter().map(|t| t.message.clone()).chain([user]).collect()
        };
        template.render(&messages)
    }
}

fn plain(turns: &[Turn]) -> String {
    turns.iter().flat_map(|t| [t.message.content.as_str(), &t.delimiter]).collect()
}

/// Two texts in one, with a delimiter unless one of them is empty or there is white space where they meet.
pub(crate) fn joined(first: &str, second: &str, delimiter: &str) -> String {
    let meets_space = first.ends_with(python_space) || second.starts_with(python_space);
    let delimiter = if first.is_empty() || second.is_empty() || meets_space { "" } else { delimiter };
    [first, delimiter, second].concat()
}
