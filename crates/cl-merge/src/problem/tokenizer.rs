//! Tokenizers that do not fit together.

use super::Joint;

/// What is wrong with tokenizers, or with what the merge file says of the output's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerProblem {
    /// Both `tokenizer` and `tokenizer_source`.
    #[error("set either `tokenizer` or `tokenizer_source`")]
    SourceTwice,
    /// A source that is none of the models.
    #[error("`{named}` is none of the models; set {}or a model by its path or name", words.iter().map(|word| format!("`{word}`, ")).collect::<String>())]
    NotAModel {
        /// What the file names.
        named: String,
        /// Words that it could name beside models.
        words: &'static [&'static str],
    },
    /// Rows as a multiple of zero.
    #[error("has to be at least 1")]
    PadToZero,
    /// One number for two tokens, so that rows of token tables mean different things.
    #[error(
        "{} and {}: token {id} is {:?} in one tokenizer.json and {:?} in the other, so the rows of their token tables mean \
         different things; align the rows by token with `tokenizer`, or set `ignore_tokenizers` to true to merge rows by their number \
         all the same", models[0], models[1], tokens[0], tokens[1]
    )]
    Differ {
        /// Two models.
        models: [String; 2],
        /// The number.
        id: u64,
        /// The token of each.
        tokens: [String; 2],
    },
    /// A model without `tokenizer.json`.
    #[error("has no tokenizer.json; save its tokenizer with Transformers (save_pretrained) into its directory")]
    NoTokenizer,
    /// A `tokenizer.json` without tokens.
    #[error("has no tokens under `model.vocab`")]
    NoTokens,
    /// A file of a tokenizer that is not JSON.
    #[error(transparent)]
    Json(serde_json::Error),
    /// A model whose tokens have no rows.
    #[error("has no token table that a tokenizer could be merged with")]
    NoTable,
    /// A token table that some models have and others lack.
    #[error("is not in all models; with `tokenizer` it has to be, or in none")]
    TableMissing,
    /// A row of a model that is not among those that are merged here.
    #[error("{model} is none of the models that are merged here")]
    NotMergedHere {
        /// The model.
        model: String,
    },
    /// A row of a model that does not have the token.
    #[error("{model} does not have it")]
    LacksIt {
        /// The model.
        model: String,
    },
    /// Neither `token` nor `token_id`, or both.
    #[error("name either `token` or `token_id` of the model")]
    TokenOrId,
    /// A token that a model does not have.
    #[error("{model} has no token `{token}`")]
    NoSuchToken {
        /// The model.
        model: String,
        /// The token, or its number.
        token: String,
    },
    /// A model without the chat template that is asked of it.
    #[error("{model} has none")]
    NoChatTemplate {
        /// The model.
        model: String,
    },
    /// A chat template that is none.
    #[error(
        "`{given}` is neither `auto`, one of the models nor a template; templates have no names here, write the text"
    )]
    ChatTemplate {
        /// What the file says.
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
