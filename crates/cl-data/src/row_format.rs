//! Conversion of a row to an example.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::jinja::{Dialect, Template, environment};
use crate::problem::{ColumnsProblem, RowProblem};
use crate::row::Row;
use crate::rows::kind;
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
    /// `instruction`, `input` (optional) and `output`, with Alpaca's prompt.
    Alpaca,
    /// `query` and `response` (MetaMathQA), with Alpaca's prompt; the first line of the query is the instruction.
    MetaMath,
    /// `question` and `answer`, with lm-evaluation-harness's prompt for GSM8K.
    Gsm8k,
    /// `messages`, a list with `role` and `content`; or `conversations`, a list with `from` and `value` (ShareGPT).
    Messages,
    /// `text`; the loss covers all of it.
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

    /// Checks that the names can be combined.
    ///
    /// # Errors
    /// Returns the first problem.
    pub fn validate(&self) -> Result<(), ColumnsProblem> {
        match (&self.prompt, &self.answer, &self.messages) {
            (None, None, None) | (_, Some(_), None) => {}
            (None, None, Some(name)) if !name.contains("{{") => return Ok(()),
            (None, None, Some(_)) => return Err(ColumnsProblem::MessagesTemplate),
            (Some(_), None, _) => return Err(ColumnsProblem::NoAnswer),
            (_, _, Some(_)) => return Err(ColumnsProblem::MessagesAndPair),
        }
        Field::parse("prompt", self.prompt.as_deref())?;
        Field::parse("answer", self.answer.as_deref())?;
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
    pub(crate) fn new(format: Format, columns: &Columns) -> Result<RowFormat, ColumnsProblem> {
        columns.validate()?;
        let prompt = Field::parse("prompt", columns.prompt.as_deref())?;
        let columns = match (&columns.messages, Field::parse("answer", columns.answer.as_deref())?) {
            (Some(name), _) => Some(ParsedColumns::Messages(name.clone())),
            (None, Some(answer)) => Some(ParsedColumns::Pair { prompt, answer }),
            (None, None) => None,
        };
        Ok(RowFormat { format, columns })
    }

    /// Converts a row to an example.
    pub(crate) fn example(&mut self, path: &Path, index: usize, row: &Row) -> Result<Example, Error> {
        let wrong = |problem| Error::Row { path: path.to_owned(), row: index, problem: Box::new(problem) };
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

/// The name of a field, or a template over the fields with its key in [`Columns`].
enum Field {
    Name(String),
    Template(&'static str, Box<Template>),
}

impl Field {
    /// Parses the value of a key of [`Columns`].
    fn parse(key: &'static str, text: Option<&str>) -> Result<Option<Field>, ColumnsProblem> {
        let Some(text) = text else { return Ok(None) };
        if !text.contains("{{") && !text.contains("{%") {
            return Ok(Some(Field::Name(text.to_owned())));
        }
        let template = Template::new(&environment(Dialect::LmEval), text);
        let template = template.map_err(|error| ColumnsProblem::Template { key, error })?;
        Ok(Some(Field::Template(key, Box::new(template))))
    }

    fn of(&self, row: &Row) -> Result<String, RowProblem> {
        match self {
            Field::Name(name) => text_of(row, name),
            Field::Template(column, template) => {
                let context: BTreeMap<&str, &Value> = row.iter().map(|(key, value)| (key.as_str(), value)).collect();
                let rendered = template.render(minijinja::Value::from_serialize(context));
                rendered.map_err(|error| {
                    let undefined = error.kind() == minijinja::ErrorKind::UndefinedError;
                    let names = template.undeclared_variables();
                    let absent = names.iter().filter(|name| undefined && !row.contains_key(*name)).min();
                    absent.map_or(RowProblem::Template { column, error }, |name| missing(row, name))
                })
            }
        }
    }
}

/// Returns a field as text. Numbers and booleans are formatted as in JSON.
fn text_of(row: &Row, key: &str) -> Result<String, RowProblem> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
        Some(other) => Err(RowProblem::NotText { key: key.to_owned(), found: kind(other) }),
        None => Err(missing(row, key)),
    }
}

fn missing(row: &Row, key: &str) -> RowProblem {
    RowProblem::Missing { key: key.to_owned(), keys: keys(row) }
}

fn keys(row: &Row) -> Vec<String> {
    row.keys().cloned().collect()
}

fn detect(row: &Row) -> Result<Format, RowProblem> {
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
    let format = known.iter().find(|(names, _)| has(names)).map(|(_, format)| *format);
    format.ok_or_else(|| RowProblem::UnknownFormat { keys: keys(row) })
}

fn example(row: &Row, format: Format) -> Result<Example, RowProblem> {
    let text = |key: &str| match row.get(key) {
        Some(Value::String(s)) => Ok(s.as_str()),
        Some(other) => Err(RowProblem::NotText { key: key.to_owned(), found: kind(other) }),
        None => Err(missing(row, key)),
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

/// Reads messages in the form `{"role", "content"}`, or ShareGPT's `{"from", "value"}`.
fn messages(row: &Row, key: &str) -> Result<Example, RowProblem> {
    let turns = match row.get(key) {
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(RowProblem::NotMessages { key: key.to_owned(), found: kind(other) }),
        None => return Err(missing(row, key)),
    };
    let messages = turns.iter().enumerate().map(|(index, turn)| message(key, index, turn));
    let messages: Vec<Message> = messages.collect::<Result<_, RowProblem>>()?;
    if !messages.iter().any(|m| m.role == "assistant") {
        return Err(RowProblem::NoAssistant { key: key.to_owned() });
    }
    Ok(Example::Chat { messages })
}

fn message(key: &str, index: usize, turn: &Value) -> Result<Message, RowProblem> {
    let text = |[field, alternative]: [&'static str; 2]| match turn.get(field).or_else(|| turn.get(alternative)) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(RowProblem::MessageNotText { key: key.to_owned(), index, field, found: kind(other) }),
        None => Err(RowProblem::MessageMissing { key: key.to_owned(), index, field, alternative }),
    };
    let role = match text(["role", "from"])? {
        "human" => "user",
        "gpt" => "assistant",
        role => role,
    };
    if let Some(field) = unsupported(turn) {
        return Err(RowProblem::MessageField { key: key.to_owned(), index, field });
    }
    Ok(Message::new(role, text(["content", "value"])?))
}

/// Returns an unsupported field that is part of what the assistant says, or that excludes a message from the loss.
/// Ignoring it would train on something else than the data specifies.
fn unsupported(turn: &Value) -> Option<&'static str> {
    let set = |field: &str| match turn.get(field) {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    };
    let excluded = turn.get("weight").is_some_and(|weight| !weight.is_null() && weight.as_f64() != Some(1.0));
    ["tool_calls", "function_call"].into_iter().find(|field| set(field)).or(excluded.then_some("weight"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(row: Value, columns: &Columns) -> Result<Example, String> {
        let Value::Object(row) = row else { panic!("an object") };
        let mut format = RowFormat::new(Format::Auto, columns).map_err(|e| e.to_string())?;
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
        let message = |more: Value| {
            let mut turn = json!({"role": "assistant", "content": ""});
            turn.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"messages": [turn]})
        };
        for ignored in [json!({"name": "x", "weight": 1}), json!({"tool_calls": null}), json!({"tool_calls": []})] {
            assert!(read(message(ignored), &Columns::default()).is_ok());
        }
        for (row, columns, part) in [
            (row(), Columns::default(), "unknown format with keys [a, b]"),
            (row(), columns(Some("a"), Some("c"), None), "`c` is missing; the row has the keys [a, b]"),
            (row(), columns(Some("a"), Some("b"), None), "`b` is a list, expected text"),
            (row(), columns(Some("a"), None, None), "without columns.answer"),
            (row(), columns(Some("{{ a"), Some("a"), None), "columns.prompt"),
            (row(), columns(Some("{{ z }}"), Some("a"), None), "`z` is missing; the row has the keys [a, b]"),
            (row(), columns(Some("{{ a.b.c }}"), Some("a"), None), "columns.prompt: undefined value"),
            (json!({"prompt": "x", "answer": 5}), Columns::default(), "[data.columns] accepts numbers"),
            (row(), columns(None, Some("a"), Some("b")), "one of the two"),
            (row(), columns(None, None, Some("b")), "message 0: expected `role`"),
            (json!({"messages": []}), Columns::default(), "nothing to train on"),
            (message(json!({"tool_calls": [{}]})), Columns::default(), "message 0: `tool_calls` is not supported"),
            (message(json!({"function_call": {}})), Columns::default(), "message 0: `function_call` is not supported"),
            (message(json!({"weight": 0})), Columns::default(), "message 0: `weight` is not supported"),
        ] {
            let message = read(row, &columns).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
