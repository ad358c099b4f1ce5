//! Whose tokens an output has, and where the rows of its token tables come from.

use serde::{Deserialize, Serialize};

/// The output's tokenizer. Rows of token tables follow their tokens: in every model they are put in the order of the output's
/// tokens, and then merged. A model that lacks a token takes the base's row for it, else that of the only model that has it,
/// else the mean of those that have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// `union`: the base's tokens, then those that only other models have. `base`, or a model by its path or name: its tokens.
    pub source: String,
    /// Rows of the tables become a multiple of it; those without a token are the mean of all that have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_to_multiple_of: Option<usize>,
    /// Where rows of single tokens come from. Tokens that no tokenizer has are added, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenConfig>,
}

/// The value of `source` that takes the tokens of all models.
pub(crate) const UNION: &str = "union";

impl Default for TokenizerConfig {
    fn default() -> Self {
        TokenizerConfig { source: UNION.to_owned(), pad_to_multiple_of: None, tokens: Vec::new() }
    }
}

/// Where the rows of a token come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// The token, as its tokenizer writes it.
    pub token: String,
    /// What models that lack the token take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<TokenSource>,
    /// Models that have the token take it, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// A row of a token table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a model, {kind = \"zero\"}, or {kind = \"model_token\", model, token or token_id}")]
pub enum TokenSource {
    /// This model's row of the token.
    Model(String),
    /// Another row.
    Kind(TokenKind),
}

/// A row that is not the token's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TokenKind {
    /// Zeros.
    Zero,
    /// The row of some token of a model; either `token` or `token_id` names it.
    ModelToken {
        /// The model.
        model: String,
        /// The token.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<String>,
        /// Its number.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token_id: Option<usize>,
    },
}
