//! Conversion of a row to an example.

use std::cell::Cell;
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
    /// `prompt` and `completion`, verbatim (TRL); if both are lists of messages, a conversation whose `completion` is
    /// trained.
    PromptCompletion,
    /// `instruction`, `input` (optional) and `output`, with Alpaca's prompt; a conversation if the row has a `system`
    /// text or a `history` of `[user, assistant]` pairs (LLaMA-Factory).
    Alpaca,
    /// `query` and `response` (MetaMathQA), with Alpaca's prompt; the first line of the query is the instruction.
    MetaMath,
    /// `question` and `answer`, with lm-evaluation-harness's prompt for GSM8K.
    Gsm8k,
    /// `messages`, a list with `role` and `content`; or `conversations`, a list with `from` and `value` (ShareGPT). A
    /// `system` text of the row is its system message.
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
    format: Cell<Format>,
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
        Ok(RowFormat { format: Cell::new(format), columns })
    }

    /// Converts a row to an example.
    pub(crate) fn example(&self, path: &Path, index: usize, row: &Row) -> Result<Example, Error> {
        let wrong = |problem| Error::Row { path: path.to_owned(), row: index, problem: Box::new(problem) };
        match &self.columns {
            Some(ParsedColumns::Messages(name)) => conversation(row, name).map_err(wrong),
            Some(ParsedColumns::Pair { prompt, answer }) => {
                let prompt = prompt.as_ref().map_or(Ok(String::new()), |field| field.of(row)).map_err(wrong)?;
                Ok(Example::Pair { prompt, answer: answer.of(row).map_err(wrong)? })
            }
            None => {
                if self.format.get() == Format::Auto {
                    self.format.set(detect(row.keys().map(String::as_str)).map_err(wrong)?);
                }
                example(row, self.format.get()).map_err(wrong)
            }
        }
    }

    /// Returns those of a file's fields that examples are made of.
    pub(crate) fn used(&self, names: &[&str]) -> Vec<String> {
        let used: Vec<String> = match &self.columns {
            Some(ParsedColumns::Messages(name)) => vec![name.clone(), "system".to_owned()],
            Some(ParsedColumns::Pair { prompt, answer }) => {
                prompt.iter().chain([answer]).flat_map(Field::fields).collect()
            }
            None => {
                let detected = || detect(names.iter().copied()).ok();
                let format = Some(self.format.get()).filter(|format| *format != Format::Auto).or_else(detected);
                let fields: &[&str] = match format {
                    None => &[],
                    Some(Format::Messages) if names.contains(&"messages") => &["messages", "system"],
                    Some(Format::Messages) => &["conversations", "system"],
                    Some(Format::Auto | Format::PromptAnswer) => &["prompt", "answer"],
                    Some(Format::PromptCompletion) => &["prompt", "completion"],
                    Some(Format::Alpaca) => &["instruction", "input", "output", "system", "history"],
                    Some(Format::MetaMath) => &["query", "response"],
                    Some(Format::Gsm8k) => &["question", "answer"],
                    Some(Format::Text) => &["text"],
                };
                fields.iter().map(|field| field.to_string()).collect()
            }
        };
        used.into_iter().filter(|field| names.contains(&field.as_str())).collect()
    }

    /// Whether a row is in a format of conversations and has `tools`, which are not passed to the chat template.
    pub(crate) fn ignores_tools(&self, row: &Row) -> bool {
        let can_have_tools = match &self.columns {
            Some(columns) => matches!(columns, ParsedColumns::Messages(_)),
            None => matches!(self.format.get(), Format::Messages | Format::PromptCompletion | Format::Alpaca),
        };
        can_have_tools
            && match row.get("tools") {
                None | Some(Value::Null) => false,
                Some(Value::String(text)) => !matches!(text.trim(), "" | "[]" | "null"),
                Some(Value::Array(tools)) => !tools.is_empty(),
                Some(_) => true,
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

    /// Returns the names of the fields that it needs.
    fn fields(&self) -> Vec<String> {
        match self {
            Field::Name(name) => vec![name.clone()],
            Field::Template(_, template) => template.undeclared_variables().into_iter().collect(),
        }
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

fn detect<'k>(keys: impl Iterator<Item = &'k str>) -> Result<Format, RowProblem> {
    let keys: Vec<&str> = keys.collect();
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
    let format = known.iter().find(|(names, _)| names.iter().all(|name| keys.contains(name)));
    let unknown = || RowProblem::UnknownFormat { keys: keys.iter().map(|key| key.to_string()).collect() };
    format.map(|(_, format)| *format).ok_or_else(unknown)
}

fn example(row: &Row, format: Format) -> Result<Example, RowProblem> {
    Ok(match format {
        Format::Auto | Format::PromptAnswer => Example::pair(text(row, "prompt")?, text(row, "answer")?),
        Format::PromptCompletion if matches!(row.get("prompt"), Some(Value::Array(_))) => return completion(row),
        Format::PromptCompletion => Example::pair(text(row, "prompt")?, text(row, "completion")?),
        Format::Alpaca => return alpaca(row),
        Format::MetaMath => template::metamath(text(row, "query")?, text(row, "response")?),
        Format::Gsm8k => template::gsm8k(text(row, "question")?, text(row, "answer")?),
        Format::Messages => {
            return conversation(row, if row.contains_key("messages") { "messages" } else { "conversations" });
        }
        Format::Text => Example::pair("", text(row, "text")?),
    })
}

fn text<'r>(row: &'r Row, key: &str) -> Result<&'r str, RowProblem> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(RowProblem::NotText { key: key.to_owned(), found: kind(other) }),
        None => Err(missing(row, key)),
    }
}

/// Returns a field that may be absent; null counts as absent.
fn optional_text<'r>(row: &'r Row, key: &str) -> Result<&'r str, RowProblem> {
    if matches!(row.get(key), None | Some(Value::Null)) { Ok("") } else { text(row, key) }
}

/// Reads a row of Alpaca's fields. With a system message or earlier turns, which Alpaca's prompt has no place for, it is
/// a conversation, in which `input` follows `instruction` on a new line, as in LLaMA-Factory:
/// <https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md#alpaca-format>.
fn alpaca(row: &Row) -> Result<Example, RowProblem> {
    let (instruction, input) = (text(row, "instruction")?, optional_text(row, "input")?);
    let (output, system, history) = (text(row, "output")?, optional_text(row, "system")?, history(row)?);
    if system.is_empty() && history.is_empty() {
        return Ok(Example::pair(template::alpaca(instruction, input), output));
    }
    let mut messages: Vec<Message> = Vec::new();
    messages.extend((!system.is_empty()).then(|| Message::new("system", system)));
    messages.extend(history);
    let question = if input.is_empty() { instruction.to_owned() } else { format!("{instruction}\n{input}") };
    messages.extend([Message::new("user", question), Message::new("assistant", output)]);
    Ok(Example::chat(messages))
}

/// Reads `history`, a list of `[user, assistant]` pairs, as messages.
fn history(row: &Row) -> Result<Vec<Message>, RowProblem> {
    let turns = match row.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(text)) if text.is_empty() => return Ok(Vec::new()), // an empty cell of a table
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(RowProblem::NotHistory { found: kind(other) }),
    };
    let pair = |(index, turn): (usize, &Value)| match turn.as_array().map(Vec::as_slice) {
        Some([Value::String(user), Value::String(assistant)]) => {
            Ok([Message::new("user", user), Message::new("assistant", assistant)])
        }
        _ => Err(RowProblem::HistoryTurn { index }),
    };
    let pairs = turns.iter().enumerate().map(pair).collect::<Result<Vec<_>, RowProblem>>()?;
    Ok(pairs.into_iter().flatten().collect())
}

/// Reads a conversation in two parts, `prompt` and `completion`; the loss covers only the second:
/// <https://huggingface.co/docs/trl/dataset_formats#prompt-completion>.
fn completion(row: &Row) -> Result<Example, RowProblem> {
    let (mut messages, completion) = (messages(row, "prompt")?, messages(row, "completion")?);
    require_assistant(&completion, "completion")?;
    let context = messages.len();
    messages.extend(completion);
    Ok(Example::Chat { messages, context })
}

/// Reads a conversation. The row's `system` is its system message, unless it has its own.
fn conversation(row: &Row, key: &str) -> Result<Example, RowProblem> {
    let mut messages = messages(row, key)?;
    require_assistant(&messages, key)?;
    let system = optional_text(row, "system")?;
    if !system.is_empty() && messages[0].role != "system" {
        messages.insert(0, Message::new("system", system));
    }
    Ok(Example::chat(messages))
}

fn require_assistant(messages: &[Message], key: &str) -> Result<(), RowProblem> {
    let found = messages.iter().any(|m| m.role == "assistant");
    if found { Ok(()) } else { Err(RowProblem::NoAssistant { key: key.to_owned() }) }
}

/// Reads messages in the form `{"role", "content"}`, or ShareGPT's `{"from", "value"}`.
/// Reads the conversation in a field of a row: a list of `{"role", "content"}` (or ShareGPT's `{"from", "value"}`), where
/// the content is a text or a list of parts `{"type": "text", "text"}`.
///
/// # Errors
/// Returns the first problem, with the index of its message; calls of tools are one.
pub fn messages(row: &Row, key: &str) -> Result<Vec<Message>, RowProblem> {
    let turns = match row.get(key) {
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(RowProblem::NotMessages { key: key.to_owned(), found: kind(other) }),
        None => return Err(missing(row, key)),
    };
    turns.iter().enumerate().map(|(index, turn)| message(key, index, turn)).collect()
}

fn message(key: &str, index: usize, turn: &Value) -> Result<Message, RowProblem> {
    let value = |[field, alternative]: [&'static str; 2]| {
        let value = turn.get(field).or_else(|| turn.get(alternative));
        value.ok_or_else(|| RowProblem::MessageMissing { key: key.to_owned(), index, field, alternative })
    };
    let not_text =
        |field, found: &Value| RowProblem::MessageNotText { key: key.to_owned(), index, field, found: kind(found) };
    let role = match value(["role", "from"])? {
        Value::String(role) => role.as_str(),
        other => return Err(not_text("role", other)),
    };
    let role = match role {
        "human" => "user",
        "gpt" => "assistant",
        role => role,
    };
    if let Some(field) = unsupported(turn) {
        return Err(RowProblem::MessageField { key: key.to_owned(), index, field });
    }
    match value(["content", "value"])? {
        Value::String(text) => Ok(Message::new(role, text)),
        Value::Array(parts) => {
            let part = |(part, value)| text_part(value).map_err(|found| (part, found));
            let text = parts.iter().enumerate().map(part).collect::<Result<String, _>>();
            let wrong = |(part, found)| RowProblem::ContentPart { key: key.to_owned(), index, part, found };
            Ok(Message::new(role, text.map_err(wrong)?))
        }
        other => Err(not_text("content", other)),
    }
}

/// Returns the text of a part `{"type": "text", "text": …}` of a message's content; otherwise its type.
fn text_part(part: &Value) -> Result<&str, String> {
    match (part.get("type"), part.get("text")) {
        (Some(Value::String(name)), Some(Value::String(text))) if name == "text" => Ok(text),
        (Some(Value::String(name)), _) if name != "text" => {
            Err(format!("has the type `{}`", name.chars().take(40).collect::<String>()))
        }
        (Some(Value::String(_)), Some(other)) => Err(format!("has {} as its `text`", kind(other))),
        (Some(Value::String(_)), None) => Err("has no `text`".to_owned()),
        _ if part.is_object() => Err("has no `type`".to_owned()),
        _ => Err(format!("is {}", kind(part))),
    }
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
        let format = RowFormat::new(Format::Auto, columns).map_err(|e| e.to_string())?;
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
        let chat = Example::chat([Message::new("user", "q"), Message::new("assistant", "a")]);
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

    fn turns(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, text)| Message::new(*role, *text)).collect()
    }

    #[test]
    fn contents_in_parts_are_concatenated() {
        let plain = Columns::default();
        let row = |parts: Value| json!({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]});
        let text = |text: &str| json!({"type": "text", "text": text, "image_url": null});
        for (parts, said) in [(json!([text("hi "), text("there")]), "hi there"), (json!([]), "")] {
            assert_eq!(read(row(parts), &plain), Ok(Example::chat(turns(&[("user", said), ("assistant", "a")]))));
        }
        for (part, problem) in [
            (json!({"type": "image_url", "image_url": {"url": "x"}}), "has the type `image_url`"),
            (json!({"type": "input_text", "text": "x"}), "has the type `input_text`"),
            (json!({"type": "text", "text": 3}), "has a number as its `text`"),
            (json!({"type": "text"}), "has no `text`"),
            (json!({"text": "x"}), "has no `type`"),
            (json!("x"), "is text"),
        ] {
            let message = read(row(json!([text("hi"), part])), &plain).unwrap_err();
            let part =
                format!("row 0 (from 0): `messages`, message 0: part 1 (from 0) of `content` {problem}; supported");
            assert!(message.contains(&part), "{message}");
        }
    }

    #[test]
    fn a_prompt_and_completion_of_messages_train_the_completion() {
        let plain = Columns::default();
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let prompt = json!([message("user", "q"), message("assistant", "a"), message("user", "r")]);
        let row = |completion: Value| json!({"prompt": prompt, "completion": completion});
        let messages = turns(&[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]);
        assert_eq!(read(row(json!([message("assistant", "b")])), &plain), Ok(Example::Chat { messages, context: 3 }));
        for (row, part) in [
            (row(json!("b")), "`completion` is text, expected a list of messages"),
            (row(json!([message("user", "b")])), "`completion` has no message with the role `assistant`"),
            (
                json!({"prompt": "q", "completion": [message("assistant", "b")]}),
                "`completion` is a list, expected text",
            ),
            (json!({"prompt": prompt, "answer": "b"}), "`prompt` is a list, expected text"),
        ] {
            let message = read(row, &plain).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_row_s_system_text_is_the_system_message() {
        let plain = Columns::default();
        let with = |system: Value, first: &str| {
            let turns = json!([{"from": first, "value": "q"}, {"from": "gpt", "value": "a"}]);
            read(json!({"system": system, "conversations": turns}), &plain)
        };
        let [own, both] = [
            [("user", "q"), ("assistant", "a")].to_vec(),
            [("system", "s"), ("user", "q"), ("assistant", "a")].to_vec(),
        ];
        assert_eq!(with(json!("s"), "human"), Ok(Example::chat(turns(&both))));
        for nothing in [json!(null), json!("")] {
            assert_eq!(with(nothing, "human"), Ok(Example::chat(turns(&own))));
        }
        assert_eq!(with(json!("s"), "system"), Ok(Example::chat(turns(&[("system", "q"), ("assistant", "a")]))));
        assert!(with(json!(["s"]), "human").unwrap_err().contains("`system` is a list, expected text"));
    }

    #[test]
    fn alpaca_rows_with_a_null_input_a_system_text_or_earlier_turns() {
        let plain = Columns::default();
        let row = |more: Value| {
            let mut row = json!({"instruction": "i", "output": "o"});
            row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            read(row, &plain)
        };
        let alone = Ok(Example::pair(template::alpaca("i", ""), "o"));
        for more in [
            json!({"input": null}),
            json!({"input": "", "system": "", "history": []}),
            json!({"system": null, "history": null}),
            json!({"history": ""}),
        ] {
            assert_eq!(row(more.clone()), alone, "{more}");
        }
        let all = json!({"input": "n", "system": "s", "history": [["q", "a"], ["r", "b"]]});
        let [system, answer] = [("system", "s"), ("assistant", "o")];
        let earlier = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")];
        let messages = [&[system], earlier.as_slice(), &[("user", "i\nn"), answer]].concat();
        assert_eq!(row(all), Ok(Example::chat(turns(&messages))));
        assert_eq!(row(json!({"system": "s"})), Ok(Example::chat(turns(&[system, ("user", "i"), answer]))));
        for (history, part) in [
            (json!("q"), "`history` is text, expected a list of pairs"),
            (json!([["q", "a"], ["r"]]), "`history`, turn 1 (from 0): expected a pair of texts"),
            (json!([["q", null]]), "`history`, turn 0 (from 0)"),
        ] {
            let message = row(json!({"history": history})).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
        assert!(row(json!({"input": 3})).unwrap_err().contains("`input` is a number"));
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
