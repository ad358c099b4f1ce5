/// What is wrong with a chat template, or with a conversation that it renders.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatProblem {
    /// The template does not compile.
    #[error("invalid chat template: {source}")]
    Syntax {
        /// The template engine's error.
        r#source: minijinja::Error,
    },
    /// The template failed, or rejected the conversation.
    #[error("{source}")]
    Render {
        /// The template engine's error, with the template's own message if it raised one.
        r#source: minijinja::Error,
    },
    /// No thread could be started to render the template.
    #[error("{}", cl_checkpoint::files::explain(source))]
    Thread {
        /// The I/O error.
        r#source: std::io::Error,
    },
    /// `chat_template` has an unknown structure.
    #[error("`chat_template` is neither a string nor a list of named templates")]
    Layout,
    /// A list of named templates has no default.
    #[error("`chat_template` has no template named `default`, only [{}]", names.join(", "))]
    NoDefault {
        /// Names of its templates.
        names: Vec<String>,
    },
    /// The template changes or omits a message of the assistant.
    #[error("message {index} of the assistant is not in the text that the template renders")]
    NotRendered {
        /// 0-based index of the message in the conversation.
        index: usize,
    },
}
