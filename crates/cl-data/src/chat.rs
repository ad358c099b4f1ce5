use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use cl_checkpoint::files::read_text;
use minijinja::{Environment, Value};
use serde::{Deserialize, Serialize};

use crate::jinja::{self, Dialect, Template};
use crate::problem::ChatProblem;
use crate::{Error, special};

/// Special tokens that Transformers passes to a template, by name.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| jinja::environment(Dialect::Transformers));

/// The roles that every chat template supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// One message of a conversation. The role is a string, because templates may support other roles than those of
/// [`Role`]; `Message<Role>` is limited to these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message<R = String> {
    /// `system`, `user`, `assistant`, or another role that the template supports.
    pub role: R,
    /// The text.
    pub content: String,
}

impl Message {
    /// Creates a message.
    ///
    /// # Example
    /// ```
    /// let message = cl_data::Message::new("user", "Why?");
    /// assert_eq!((message.role.as_str(), message.content.as_str()), ("user", "Why?"));
    /// ```
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A model's chat template: the Jinja template of its tokenizer, rendered as by Transformers' `apply_chat_template`.
///
/// Values that depend on Python's own types (floats in exponential notation, `~` before a boolean) may be rendered
/// differently; `tests/chat.rs` shows what is compared. Templates are untrusted: see [`jinja`] for their limits.
///
/// # Example
/// ```
/// use cl_data::{ChatTemplate, Message};
///
/// let text = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}\
///             {% if add_generation_prompt %}<assistant>{% endif %}";
/// let template = ChatTemplate::new(text, &[("eos_token", "</s>")])?;
/// let prompt = template.render(&[Message::new("user", " Why? ")], true)?;
/// assert_eq!(prompt, "<user>Why?</s>\n<assistant>");
/// # Ok::<(), cl_data::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    template: Template,
    text: String,
    tokens: Vec<(String, String)>,
    path: PathBuf,
}

impl ChatTemplate {
    /// Compiles a template. `tokens` are the special tokens that it can refer to by name (such as `bos_token`).
    ///
    /// # Errors
    /// Returns [`Error::Chat`] if the template is invalid.
    pub fn new(text: &str, tokens: &[(&str, &str)]) -> Result<ChatTemplate, Error> {
        let tokens = tokens.iter().map(|(role, token)| (role.to_string(), token.to_string())).collect();
        Self::compile(PathBuf::from("chat template"), text.to_owned(), tokens)
    }

    /// Reads the template of a model directory: `chat_template.jinja`, or else `chat_template` in
    /// `tokenizer_config.json`, which is a string or a list of named templates, of which `default` is used. Returns
    /// `None` if the model has no template.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read, [`Error::Json`] if the configuration is not valid JSON, and
    /// [`Error::Chat`] if there is no `default` or the template is invalid.
    pub fn from_dir(dir: &Path) -> Result<Option<ChatTemplate>, Error> {
        let [config, map] = special::FILES.map(|name| special::read(&dir.join(name)));
        let (config, map) = (config?, map?);
        let token = |role: &str| {
            [&config, &map].into_iter().find_map(|file| special::token(file.as_ref().and_then(|f| f.get(role))))
        };
        let tokens = ROLES.iter().filter_map(|role| Some((role.to_string(), token(role)?))).collect();
        let file = dir.join("chat_template.jinja");
        if file.exists() {
            let text = read_text(&file, jinja::MAX_SOURCE as u64)?;
            return Self::compile(file, text, tokens).map(Some);
        }
        let path = dir.join(special::FILES[0]);
        let entry = config.as_ref().and_then(|c| c.get("chat_template")).filter(|entry| !entry.is_null());
        let Some(entry) = entry else { return Ok(None) };
        let text = default_template(entry).map_err(|problem| Error::Chat { path: path.clone(), problem })?;
        Self::compile(path, text, tokens).map(Some)
    }

    fn compile(path: PathBuf, text: String, tokens: Vec<(String, String)>) -> Result<ChatTemplate, Error> {
        let template = Template::new(&ENVIRONMENT, &without_generation(&text))
            .map_err(|source| Error::Chat { path: path.clone(), problem: ChatProblem::Syntax { source } })?;
        Ok(ChatTemplate { template, text, tokens, path })
    }

    /// Renders a conversation. With `add_generation_prompt`, the text ends with the start of the assistant's turn.
    ///
    /// The text contains its special tokens; encode it with [`Tokenizer::encode_with`](crate::Tokenizer::encode_with),
    /// which does not add a second BOS.
    ///
    /// # Errors
    /// Returns [`Error::Chat`] with the template's message if it rejects the conversation (for example, because roles
    /// do not alternate).
    pub fn render<R: Serialize>(&self, messages: &[Message<R>], add_generation_prompt: bool) -> Result<String, Error> {
        let fixed = [
            ("messages", Value::from_serialize(messages)),
            // Transformers always passes both, as None, so they are defined in templates.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let tokens = self.tokens.iter().map(|(role, token)| (role.as_str(), Value::from(token.as_str())));
        let context: Value = tokens.chain(fixed).collect();
        let rendered = jinja::on_large_stack(|| self.template.render(context));
        let rendered = rendered.map_err(|source| self.error(ChatProblem::Thread { source }))?;
        rendered.map_err(|source| self.error(ChatProblem::Render { source }))
    }

    /// Creates an error about this template.
    pub(crate) fn error(&self, problem: ChatProblem) -> Error {
        Error::Chat { path: self.path.clone(), problem }
    }

    /// Returns the template's source text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the hexadecimal blake3 hash of the template's source text.
    pub fn hash(&self) -> String {
        blake3::hash(self.text.as_bytes()).to_hex().to_string()
    }
}

fn default_template(entry: &serde_json::Value) -> Result<String, ChatProblem> {
    if let Some(text) = entry.as_str() {
        return Ok(text.to_owned());
    }
    let list = entry.as_array().ok_or(ChatProblem::Layout)?;
    let name = |e: &serde_json::Value| e.get("name").and_then(|n| n.as_str()).unwrap_or_default().to_owned();
    let default = list.iter().find(|e| name(e) == "default").and_then(|e| e.get("template")?.as_str());
    default.map(str::to_owned).ok_or_else(|| ChatProblem::NoDefault { names: list.iter().map(name).collect() })
}

/// Replaces `{% generation %}` blocks by blocks that always render, since the tag only marks the assistant's tokens for
/// masks.
fn without_generation(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let name = tag[2..].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}
