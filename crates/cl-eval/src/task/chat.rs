//! Prompts as conversations. They are rendered to text by concatenation or by a model's chat template, as in lm-eval
//! 0.4.13 with `--apply_chat_template`, `--fewshot_as_multiturn` and `--system_instruction`.

use cl_data::{ChatTemplate, Role};

use crate::metrics::python_space;
use crate::request::BoxError;

/// One message of a prompt.
pub type Message = cl_data::Message<Role>;

/// Renders a conversation that ends with a user message as a prompt, including the marker that starts the assistant's
/// turn (`add_generation_prompt`). Implemented by [`ChatTemplate`] and closures.
pub trait ChatRender {
    /// Renders the prompt for a conversation.
    ///
    /// # Errors
    /// Returns an error if the template raises one.
    fn render(&self, messages: &[Message]) -> Result<String, BoxError>;
}

impl<F: Fn(&[Message]) -> Result<String, BoxError>> ChatRender for F {
    fn render(&self, messages: &[Message]) -> Result<String, BoxError> {
        self(messages)
    }
}

impl ChatRender for ChatTemplate {
    fn render(&self, messages: &[Message]) -> Result<String, BoxError> {
        Ok(ChatTemplate::render(self, messages, true)?)
    }
}

/// A message, and the delimiter that follows it if there is no chat template.
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

/// How turns are rendered to text.
#[derive(Clone, Copy)]
pub(crate) struct Chat<'a> {
    pub(crate) template: Option<&'a dyn ChatRender>,
    pub(crate) fewshot_as_multiturn: bool,
}

impl Chat<'_> {
    /// Renders the prompt. Without a template, the turns are concatenated, each followed by its delimiter. With a
    /// template, every turn is a message, or all turns except the system's form one user message.
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

/// Concatenates two texts, with a delimiter unless one text is empty or there is already white space between them.
pub(crate) fn joined(first: &str, second: &str, delimiter: &str) -> String {
    let meets_space = first.ends_with(python_space) || second.starts_with(python_space);
    let delimiter = if first.is_empty() || second.is_empty() || meets_space { "" } else { delimiter };
    [first, delimiter, second].concat()
}
