//! The tokenizer of an output, and the sources of its embedding rows.

use serde::{Deserialize, Serialize};

/// The output's tokenizer. Embeddings and heads are aligned by token: the rows of every model are reordered to the
/// output's tokens, and then merged. If a model lacks a token, the row of the only model that has it is used, or else
/// the base's, or else the mean over the models that have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// `union` for the base's tokens followed by those that only other models have; `base`, or a model by its path or
    /// name, for its tokens.
    pub source: String,
    /// Pads the number of rows to a multiple of this; rows without a token are the mean of all rows with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_to_multiple_of: Option<usize>,
    /// Sources of the rows of individual tokens. Tokens that no tokenizer has are added, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenConfig>,
}

/// The value of `source` that uses the tokens of all models.
pub(crate) const UNION: &str = "union";

impl Default for TokenizerConfig {
    fn default() -> Self {
        TokenizerConfig { source: UNION.to_owned(), pad_to_multiple_of: None, tokens: Vec::new() }
    }
}

/// Source of the rows of a token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// The token, as written in its tokenizer.
    pub token: String,
    /// The row to use for models that lack the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<TokenSource>,
    /// Whether to use `source` also for models that have the token.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// A row of an embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a model, {kind = \"zero\"}, or {kind = \"model_token\", model, token or token_id}"
)]
pub enum TokenSource {
    /// The token's row in this model.
    Model(String),
    /// A row that is not the token's own.
    Kind(TokenKind),
}

/// A row that is not the token's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TokenKind {
    /// A row of zeros.
    Zero,
    /// The row of another token of a model, given by either `token` or `token_id`.
    ModelToken {
        /// The model.
        model: String,
        /// The token.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<String>,
        /// The token's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token_id: Option<usize>,
    },
}
