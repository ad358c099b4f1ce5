//! Conversion of a row's fields to an example.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::jinja::{Dialect, Template, environment};
use crate::rows::{Row, kind};
use crate::{Error, Example, Message, template};

/// Format of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Detected from the keys of the first row.
    #[default]
    Auto,
    /// `prompt` and `answer`, verbatim (TRACE).
    PromptAnswer,
    /// `prompt` and `completion`, verbatim (TRL).
    PromptCompletion,
    /// `instruction`, `input` (optional) and `output`, in Alpaca's prompt.
    Alpaca,
    /// `query` and `response` (MetaMathQA), in Alpaca's prompt, with the first line of the query as instruction.
    MetaMath,
    /// `question` and `answer`, in lm-evaluation-harness's prompt for GSM8K.
    Gsm8k,
    /// `messages`, a list with `role` and `content`; or `conversations`, a list with `from` and `value` (ShareGPT).
    Messages,
    /// `text`, with the loss over all of it.
    Text,
}

/// Names of a row's fields: `[data.columns]`. A value is the name of a field, or a Jinja template over the row's
/// fields, such as `"Translate: {{ german }}"`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Columns {
    /// The prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// The answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Name of the field with the conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
}

impl Columns {
    /// Whether no name is set.
    pub fn is_empty(&self) -> bool {
        *self == Columns::default()
    }

    /// Checks the combination of names.
    ///
    /// # Errors
    /// Returns a message with the key and what is expected.
    pub fn validate(&self) -> Result<(), String> {
        match (&self.prompt, &self.answer, &self.messages) {
            (None, None, None) | (_, Some(_), None) => {}
            (None, None, Some(name)) if !name.contains("{{") => return Ok(()),
            (None, None, Some(_)) => return Err("columns.messages: expected the name of a field".to_owned()),
            (Some(_), None, _) => return Err("columns.prompt is set without columns.answer: expected both".to_owned()),
            (_, _, Some(_)) => {
                return Err("columns.messages is set together with columns.prompt or columns.answer: expected only one of the two".to_owned());
            }
        }
        for (key, text) in [("prompt", &self.prompt), ("answer", &self.answer)] {
            if let Some(text) = text {
                Field::parse(text).map_err(|e| format!("columns.{key}: {e}"))?;
            }
        }
        Ok(())
    }
}

/// Converts the rows of a file to examples. The first row determines the format unless it is given.
pub(crate) struct RowFormat {
    format: Format,
    columns: Option<ParsedColumns>,
}

enum ParsedColumns {
    Pair { prompt: Option<Field>, answer: Field },
    Messages(String),
}

impl RowFormat {
    pub(crate) fn new(format: Format, columns: &Columns) -> Result<RowFormat, String> {
        columns.validate()?;
        let field = |text: &Option<String>| text.as_deref().map(Field::parse).transpose();
        let columns = match (&columns.messages, field(&columns.answer)?) {
            (Some(name), _) => Some(ParsedColumns::Messages(name.clone())),
            (None, Some(answer)) => Some(ParsedColumns::Pair { prompt: field(&columns.prompt)?, answer }),
            (None, None) => None,
        };
        Ok(RowFormat { format, columns })
    }

    /// The example of a row.
    pub(crate) fn example(&mut self, path: &Path, index: usize, row: &Row) -> Result<Example, Error> {
        let wrong = |message| Error::Row { path: path.to_owned(), row: index, message };
        match &self.columns {
            Some(ParsedColumns::Messages(name)) => messages(row, name).map_err(wrong),
            Some(ParsedColumns::Pair { prompt, answer }) => {
                let prompt = prompt.as_ref().map_or(Ok(String::new()), |field| field.of(row)).map_err(wrong)?;
                Ok(Example::Pair { prompt, answer: answer.of(row).map_err(wrong)? })
            }
            None => {
                if self.format == Format::Auto {
                    self.format = detect(row).map_err(wrong)?;
                }
                example(row, self.format).map_err(wrong)
            }
        }
    }
}

/// A field's name, or a template over the fields.
enum Field {
    Name(String),
    Template(Box<Template>),
}

impl Field {
    fn parse(text: &str) -> Result<Field, String> {
        if !text.contains("{{") && !text.contains("{%") {
            return Ok(Field::Name(text.to_owned()));
        }
        let template = Template::new(&environment(Dialect::LmEval), text).map_err(|e| e.to_string())?;
        Ok(Field::Template(Box::new(template)))
    }

    fn of(&self, row: &Row) -> Result<String, String> {
        match self {
            Field::Name(name) => text_of(row, name),
            Field::Template(template) => {
                let context: BTreeMap<&str, &Value> = row.iter().map(|(key, value)| (key.as_str(), value)).collect();
                template.render(minijinja::Value::from_serialize(context)).map_err(|e| e.to_string())
            }
        }
    }
}

/// A field as text. Numbers and booleans are formatted as in JSON.
fn text_of(row: &Row, key: &str) -> Result<String, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
        Some(other) => Err(format!("`{key}` is {}, expected text", kind(other))),
        None => Err(format!("`{key}` is missing; the row has the keys {}", keys(row))),
    }
}

/// Keys of a row, for messages.
fn keys(row: &Row) -> String {
    let beginning = |key: &String| key.chars().take(40).collect::<String>();
    let keys: Vec<String> = row.keys().take(20).map(beginning).collect();
    format!("[{}{}]", keys.join(", "), if row.len() > keys.len() { ", …" } else { "" })
}

fn detect(row: &Row) -> Result<Format, String> {
    let has = |keys: &[&str]| keys.iter().all(|k| row.contains_key(*k));
    let known: [(&[&str], Format); 8] = [
        (&["messages"], Format::Messages),
        (&["conversations"], Format::Messages),
        (&["prompt", "answer"], Format::PromptAnswer),
        (&["prompt", "completion"], Format::PromptCompletion),
        (&["instruction", "output"], Format::Alpaca),
        (&["query", "response"], Format::MetaMath),
        (&["question", "answer"], Format::Gsm8k),
        (&["text"], Format::Text),
    ];
    known.iter().find(|(names, _)| has(names)).map(|(_, format)| *format).ok_or_else(|| {
        format!(
            "unknown format with keys {}; expected messages; conversations; prompt and answer; prompt and completion; instruction and output; \
             query and response; question and answer; text. Set the field names in [data.columns], for example \
             columns = {{ prompt = \"…\", answer = \"…\" }}",
            keys(row)
        )
    })
}

fn example(row: &Row, format: Format) -> Result<Example, String> {
    let text = |key: &str| match row.get(key) {
        Some(Value::String(s)) => Ok(s.as_str()),
        Some(other) => Err(format!("`{key}` is {}, expected text", kind(other))),
        None => Err(format!("`{key}` is missing")),
    };
    Ok(match format {
        Format::Auto | Format::PromptAnswer => Example::pair(text("prompt")?, text("answer")?),
        Format::PromptCompletion => Example::pair(text("prompt")?, text("completion")?),
        Format::Alpaca => {
            let input = if row.contains_key("input") { text("input")? } else { "" };
            Example::pair(template::alpaca(text("instruction")?, input), text("output")?)
        }
        Format::MetaMath => template::metamath(text("query")?, text("response")?),
        Format::Gsm8k => template::gsm8k(text("question")?, text("answer")?),
        Format::Messages => {
            return messages(row, if row.contains_key("messages") { "messages" } else { "conversations" });
        }
        Format::Text => Example::pair("", text("text")?),
    })
}

/// Messages as `{"role", "content"}`, or as ShareGPT's `{"from", "value"}`.
fn messages(row: &Row, key: &str) -> Result<Example, String> {
    let turns = match row.get(key) {
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(format!("`{key}` is {}, expected a list of messages", kind(other))),
        None => return Err(format!("`{key}` is missing; the row has the keys {}", keys(row))),
    };
    let messages =
        turns.iter().enumerate().map(|(i, turn)| message(turn).map_err(|e| format!("`{key}`, message {i}: {e}")));
    let messages: Vec<Message> = messages.collect::<Result<_, String>>()?;
    if !messages.iter().any(|m| m.role == "assistant") {
        return Err(format!("`{key}` has no message with the role `assistant`, so there is nothing to train on"));
    }
    Ok(Example::Chat { messages })
}

fn message(turn: &Value) -> Result<Message, String> {
    let text = |names: [&str; 2]| {
        let found = names.iter().find_map(|name| turn.get(name));
        match found {
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(other) => Err(format!("`{}` is {}, expected text", names[0], kind(other))),
            None => Err(format!("expected `{}` (or `{}`)", names[0], names[1])),
        }
    };
    let role = match text(["role", "from"])? {
        "human" => "user",
        "gpt" => "assistant",
        role => role,
    };
    Ok(Message::new(role, text(["content", "value"])?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(row: Value, columns: &Columns) -> Result<Example, String> {
        let Value::Object(row) = row else { panic!("an object") };
        let mut format = RowFormat::new(Format::Auto, columns)?;
        format.example(Path::new("x"), 0, &row).map_err(|e| e.to_string())
    }

    fn columns(prompt: Option<&str>, answer: Option<&str>, messages: Option<&str>) -> Columns {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Columns { prompt: owned(prompt), answer: owned(answer), messages: owned(messages) }
    }

    #[test]
    fn rows_by_their_keys() {
        let plain = Columns::default();
        assert_eq!(read(json!({"prompt": "p", "completion": "c"}), &plain), Ok(Example::pair("p", "c")));
        assert_eq!(read(json!({"text": "t"}), &plain), Ok(Example::pair("", "t")));
        let chat = Example::Chat { messages: vec![Message::new("user", "q"), Message::new("assistant", "a")] };
        let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(read(json!({"messages": turns, "prompt": "x", "answer": "y"}), &plain).as_ref(), Ok(&chat));
        let turns = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
        assert_eq!(read(json!({"conversations": turns}), &plain).as_ref(), Ok(&chat));
        assert_eq!(read(json!({"chat": turns}), &columns(None, None, Some("chat"))), Ok(chat));
    }

    #[test]
    fn rows_by_columns() {
        let row = json!({"german": "Hund", "english": "dog", "stars": 4});
        let both = columns(Some("Translate: {{ german }}"), Some("english"), None);
        assert_eq!(read(row.clone(), &both), Ok(Example::pair("Translate: Hund", "dog")));
        assert_eq!(read(row, &columns(None, Some("stars"), None)), Ok(Example::pair("", "4")));
    }

    #[test]
    fn errors_say_what_to_write() {
        let row = || json!({"a": "x", "b": ["y"]});
        for (row, columns, part) in [
            (row(), Columns::default(), "unknown format with keys [a, b]"),
            (row(), columns(Some("a"), Some("c"), None), "`c` is missing; the row has the keys [a, b]"),
            (row(), columns(Some("a"), Some("b"), None), "`b` is a list, expected text"),
            (row(), columns(Some("a"), None, None), "without columns.answer"),
            (row(), columns(Some("{{ a"), Some("a"), None), "columns.prompt"),
            (row(), columns(Some("{{ z }}"), Some("a"), None), "undefined"),
            (row(), columns(None, Some("a"), Some("b")), "one of the two"),
            (row(), columns(None, None, Some("b")), "message 0: expected `role`"),
            (json!({"messages": []}), Columns::default(), "nothing to train on"),
        ] {
            let message = read(row, &columns).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
