/// What is wrong with [`Columns`](crate::Columns).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ColumnsProblem {
    /// A template in place of the name of the field with the conversation.
    #[error("columns.messages: expected the name of a field")]
    MessagesTemplate,
    /// A prompt without an answer.
    #[error("columns.prompt is set without columns.answer: expected both")]
    NoAnswer,
    /// A conversation together with a prompt or an answer.
    #[error("columns.messages is set together with columns.prompt or columns.answer: expected only one of the two")]
    MessagesAndPair,
    /// A template does not compile.
    #[error("columns.{key}: {source}")]
    Template {
        /// `prompt` or `answer`.
        key: &'static str,
        /// The template engine's error.
        source: minijinja::Error,
    },
}
