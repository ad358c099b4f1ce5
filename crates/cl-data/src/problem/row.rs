use super::columns::template_message;

/// Why a row cannot be converted to an example.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowProblem {
    /// The row is not an object.
    #[error("expected an object like {{\"prompt\": …, \"answer\": …}}, got {found}")]
    NotAnObject {
        /// Its type: `a list`, `text`, ….
        found: &'static str,
    },
    /// The keys belong to no known format.
    #[error(
        "unknown format with keys {}; expected messages; conversations; prompt and answer; prompt and completion; \
         instruction and output; query and response; question and answer; text. Set the names of the fields \
         with `columns`, for example columns = {{ prompt = \"…\", answer = \"…\" }}; for rows to be scored, write a \
         task description",
        list(keys)
    )]
    UnknownFormat {
        /// Keys of the row.
        keys: Vec<String>,
    },
    /// A key is missing.
    #[error("`{key}` is missing; the row has the keys {}", list(keys))]
    Missing {
        /// The key.
        key: String,
        /// Keys of the row.
        keys: Vec<String>,
    },
    /// A value is not text.
    #[error("`{key}` is {found}, expected text{}", if *found == "a number" { "; [data.columns] accepts numbers, too" } else { "" })]
    NotText {
        /// Its key.
        key: String,
        /// Its type: `a list`, `a number`, ….
        found: &'static str,
    },
    /// A template over the row's fields cannot be rendered.
    #[error("columns.{column}: {}", template_message(error))]
    Template {
        /// Its key in `columns`.
        column: &'static str,
        /// The template engine's error.
        error: minijinja::Error, // not a source: its text would be printed again
    },
    /// A value is not a conversation.
    #[error("`{key}` is {found}, expected a list of messages")]
    NotMessages {
        /// Its key.
        key: String,
        /// Its type: `text`, `an object`, ….
        found: &'static str,
    },
    /// A message lacks a field.
    #[error("`{key}`, message {index}: expected `{field}` (or `{alternative}`)")]
    MessageMissing {
        /// Key of the conversation.
        key: String,
        /// 0-based index of the message.
        index: usize,
        /// `role` or `content`.
        field: &'static str,
        /// The same field in ShareGPT's format: `from` or `value`.
        alternative: &'static str,
    },
    /// A field of a message is not text.
    #[error("`{key}`, message {index}: `{field}` is {found}, expected text")]
    MessageNotText {
        /// Key of the conversation.
        key: String,
        /// 0-based index of the message.
        index: usize,
        /// The field.
        field: &'static str,
        /// Its type: `a list`, `null`, ….
        found: &'static str,
    },
    /// A part of a message's content is not text.
    #[error(
        "`{key}`, message {index}: part {part} (from 0) of `content` {found}; supported: parts \
         {{\"type\": \"text\", \"text\": …}}"
    )]
    ContentPart {
        /// Key of the conversation.
        key: String,
        /// 0-based index of the message.
        index: usize,
        /// 0-based index of the part.
        part: usize,
        /// What it is instead: ``has the type `image_url` ``, ….
        found: String,
    },
    /// `history` is not a list.
    #[error("`history` is {found}, expected a list of pairs [user, assistant]")]
    NotHistory {
        /// Its type: `text`, `an object`, ….
        found: &'static str,
    },
    /// A turn of `history` is not a pair of texts.
    #[error("`history`, turn {index} (from 0): expected a pair of texts, [user, assistant]")]
    HistoryTurn {
        /// 0-based index of the turn.
        index: usize,
    },
    /// A message has an unsupported field that would change what is trained on.
    #[error("`{key}`, message {index}: `{field}` is not supported; remove it, or leave out such conversations")]
    MessageField {
        /// Key of the conversation.
        key: String,
        /// 0-based index of the message.
        index: usize,
        /// The field.
        field: &'static str,
    },
    /// A conversation has no message to train on.
    #[error("`{key}` has no message with the role `assistant`, so there is nothing to train on")]
    NoAssistant {
        /// Key of the conversation.
        key: String,
    },
}

/// Lists the keys of a row, shortened to a readable length.
fn list(keys: &[String]) -> String {
    let shown: Vec<String> = keys.iter().take(20).map(|key| key.chars().take(40).collect()).collect();
    format!("[{}{}]", shown.join(", "), if keys.len() > shown.len() { ", …" } else { "" })
}
