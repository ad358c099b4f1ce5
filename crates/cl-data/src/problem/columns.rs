/// What is wrong with [`Columns`](crate::Columns).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ColumnsProblem {
    /// A template is given where the name of the conversation's field is expected.
    #[error("columns.messages: expected the name of a field")]
    MessagesTemplate,
    /// A prompt is given without an answer.
    #[error("columns.prompt is set without columns.answer: expected both")]
    NoAnswer,
    /// A conversation is given together with a prompt or an answer.
    #[error("columns.messages is set together with columns.prompt or columns.answer: expected only one of the two")]
    MessagesAndPair,
    /// A template does not compile.
    #[error("columns.{key}: {}", template_message(error))]
    Template {
        /// `prompt` or `answer`.
        key: &'static str,
        /// The template engine's error.
        error: minijinja::Error, // not a source: its text would be printed again
    },
}

/// Formats the error without its position, since the template has one line.
pub(super) fn template_message(error: &minijinja::Error) -> String {
    error.to_string().replace(" (in <string>:1)", "")
}
