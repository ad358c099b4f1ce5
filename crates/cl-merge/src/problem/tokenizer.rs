//! Problems with tokenizers.

use super::Joint;

/// A problem with tokenizers, or with the tokenizer settings of the merge file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerProblem {
    /// Both `tokenizer` and `tokenizer_source` are set.
    #[error("set either `tokenizer` or `tokenizer_source`")]
    SourceTwice,
    /// The source is not one of the models.
    #[error("`{named}` is not one of the models; set {}or a model by its path or name", words.iter().map(|word| format!("`{word}`, ")).collect::<String>())]
    NotAModel {
        /// The name in the file.
        named: String,
        /// Keywords that are accepted in addition to models.
        words: &'static [&'static str],
    },
    /// The multiple for padding rows is zero.
    #[error("must be at least 1")]
    PadToZero,
    /// Two models use one id for different tokens, so that rows of token tables have different meanings.
    #[error(
        "{} and {}: token {id} is {:?} in one tokenizer.json and {:?} in the other, so the rows of their embeddings \
         belong to different tokens; align the rows by token with `tokenizer`, or set `ignore_tokenizers` to true to \
         merge rows by index anyway", models[0], models[1], tokens[0], tokens[1]
    )]
    Differ {
        /// Two models.
        models: [String; 2],
        /// The id.
        id: u64,
        /// The token in each model.
        tokens: [String; 2],
    },
    /// A model has no `tokenizer.json`.
    #[error("has no tokenizer.json; save its tokenizer with Transformers (save_pretrained) into its directory")]
    NoTokenizer,
    /// A `tokenizer.json` has no tokens.
    #[error("has no tokens under `model.vocab`")]
    NoTokens,
    /// A tokenizer file is not valid JSON.
    #[error(transparent)]
    Json(serde_json::Error),
    /// A model has no token table.
    #[error("has no embedding whose rows could be aligned with the tokenizer")]
    NoTable,
    /// A token table exists in some models but not in others.
    #[error("is in some models only; with `tokenizer`, it must be in all models or in none")]
    TableMissing,
    /// A row is to be taken from a model that is not among the models merged here.
    #[error("{model} is not one of the models in this merge")]
    NotMergedHere {
        /// The model.
        model: String,
    },
    /// A row is to be taken from a model that does not have the token.
    #[error("{model} does not have this token")]
    LacksIt {
        /// The model.
        model: String,
    },
    /// Neither `token` nor `token_id` is set, or both are.
    #[error("specify either `token` or `token_id` of the model")]
    TokenOrId,
    /// A model does not have the given token.
    #[error("{model} has no token `{token}`")]
    NoSuchToken {
        /// The model.
        model: String,
        /// The token or its id.
        token: String,
    },
    /// A model does not have the requested chat template.
    #[error("{model} has no chat template")]
    NoChatTemplate {
        /// The model.
        model: String,
    },
    /// A chat template is invalid.
    #[error(
        "`{given}` is neither `auto`, nor a model, nor a template; named templates are not supported, so write the \
         text of the template"
    )]
    ChatTemplate {
        /// The value in the file.
        given: String,
    },
}

impl TokenizerProblem {
    pub(super) fn joint(&self) -> Joint {
        match self {
            TokenizerProblem::NotAModel { .. } | TokenizerProblem::TableMissing => Joint::Sentence,
            TokenizerProblem::Differ { .. } => Joint::Alone,
            _ => Joint::Colon,
        }
    }
}
