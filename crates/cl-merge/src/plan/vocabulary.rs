//! Alignment of the embeddings of models with different tokenizers to one tokenizer.

use std::collections::BTreeMap;
use std::sync::Arc;

use cl_checkpoint::Dtype;
use serde_json::{Map, Value};

use super::inputs::{Input, Inputs};
use super::token_table::{Row, Table, TokenTable};
use super::tokens::{NewTokenizer, Tokens, chat_template, put_chat_template};
use crate::problem::{Place, Problem, TokenizerProblem};
use crate::recipe::config::MergeConfig;
use crate::recipe::tokenizer::{TokenConfig, TokenKind, TokenSource, UNION};

/// The vocabulary of the output, and the tokenizers of all inputs.
pub(crate) struct Vocabulary<'c> {
    wanted: BTreeMap<&'c str, &'c TokenConfig>,
    new: NewTokenizer,
    /// The output's tokens by id.
    tokens: Vec<Option<String>>,
    /// Number of rows of the output's token tables.
    pub(crate) rows: usize,
    /// The tokenizers of the inputs.
    of_inputs: Vec<Arc<Tokens>>,
}

/// One input's token table in a merge.
pub(crate) struct Participant<'i> {
    pub(crate) model: usize,
    pub(crate) input: &'i Input,
    pub(crate) tensor: &'i str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'i [usize],
}

/// Whether a tensor has one row for each token.
pub(crate) fn is_token_table(name: &str, shape: &[usize]) -> bool {
    let table = ["embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out"].iter().any(|t| name.contains(t));
    (table && shape.len() == 2 || name.contains("lm_head") && !shape.is_empty()) && shape[1..].iter().all(|d| *d > 0)
}

/// Returns the number of rows of a model's token table.
fn rows(input: &Input) -> Option<usize> {
    let source = input.source();
    let tables = source.names().into_iter().filter(|name| !name.contains("lm_head"));
    let rows = tables.filter_map(|name| source.info(name).filter(|info| is_token_table(name, &info.shape)));
    rows.map(|info| info.shape[0]).max()
}

impl<'c> Vocabulary<'c> {
    /// Determines the vocabulary that a merge file requests; `None` if it does not configure a tokenizer.
    ///
    /// # Errors
    /// Returns all problems.
    pub(crate) fn new(
        config: &'c MergeConfig,
        inputs: &Inputs,
        reference: usize,
        notes: &mut Vec<String>,
    ) -> Result<Option<Vocabulary<'c>>, Vec<Problem>> {
        let Some(tokenizer) = &config.tokenizer else { return Ok(None) };
        let mut problems = Vec::new();
        let mut read = Vec::new();
        let mut table_rows = Vec::new();
        for input in &inputs.models {
            read.push(Tokens::read(input).unwrap_or_else(|problem| {
                problems.push(problem);
                None
            }));
            table_rows.push(rows(input).unwrap_or_else(|| {
                problems.push(Problem::new(Place::model(&input.written), TokenizerProblem::NoTable));
                0
            }));
        }
        let read: Vec<Option<Arc<Tokens>>> = read.into_iter().map(|tokens| tokens.map(Arc::new)).collect();
        let source = match tokenizer.source.as_str() {
            UNION | "base" => Some(reference),
            written => {
                let found = inputs.find(config, written);
                if found.is_none() {
                    let kind = TokenizerProblem::NotAModel { named: written.to_owned(), words: &[UNION, "base"] };
                    problems.push(Problem::new(Place::key("tokenizer.source"), kind));
                }
                found
            }
        };
        if tokenizer.pad_to_multiple_of == Some(0) {
            problems.push(Problem::new(Place::key("tokenizer.pad_to_multiple_of"), TokenizerProblem::PadToZero));
        }
        for index in [source, Some(reference)].into_iter().flatten() {
            if read[index].is_none() && problems.is_empty() {
                let place = Place::model(&inputs.models[index].written);
                problems.push(Problem::new(place, TokenizerProblem::NoTokenizer));
            }
        }
        let (Some(source), Some(of_reference), true) = (source, &read[reference], problems.is_empty()) else {
            return Err(problems);
        };
        let without = inputs.models.iter().zip(&read).filter(|(_, tokens)| tokens.is_none());
        notes.extend(without.map(|(input, _)| {
            format!("{}: has no tokenizer.json; its tokens are taken to be the base's", input.written)
        }));
        let of_inputs: Vec<Arc<Tokens>> =
            read.iter().map(|tokens| tokens.clone().unwrap_or_else(|| of_reference.clone())).collect();
        let mut new = if tokenizer.source == UNION {
            let others = (0..inputs.models.len()).filter(|i| *i != reference);
            let all = std::iter::once(reference).chain(others).map(|i| (i, &*of_inputs[i], table_rows[i]));
            NewTokenizer::union(&all.collect::<Vec<_>>())
        } else {
            NewTokenizer::of(source, &of_inputs[source], table_rows[source])
        };
        if new.literal() > 0 {
            notes.push(format!(
                "{} tokens of models other than the base become added tokens, as in mergekit: texts that contain them \
                 are tokenized differently than by each of the models",
                new.literal()
            ));
        }
        new.extend(&of_inputs[new.model], tokenizer.tokens.iter().map(|token| token.token.as_str()));
        let mut tokens = vec![None; new.len()];
        new.ids.iter().for_each(|(token, id)| tokens[*id] = Some(token.clone()));
        let rows = tokens.len().next_multiple_of(tokenizer.pad_to_multiple_of.unwrap_or(1));
        let wanted = tokenizer.tokens.iter().map(|token| (token.token.as_str(), token)).collect();
        Ok(Some(Vocabulary { wanted, new, tokens, rows, of_inputs }))
    }

    /// Returns the model whose tokenizer files, special tokens and generation settings the output has.
    pub(crate) fn model(&self) -> usize {
        self.new.model
    }

    /// Reorders the tables of some models to the output's tokens; the results are in the order of `of`.
    ///
    /// # Errors
    /// Returns an error if a token's source is invalid.
    pub(crate) fn align(
        &self,
        of: &[Participant<'_>],
        base: Option<usize>,
        inputs: &Inputs,
    ) -> Result<Vec<TokenTable>, Problem> {
        let tables = of.iter().map(|p| Table { source: p.input.shared(), tensor: p.tensor.to_owned(), dtype: p.dtype });
        let tables = Arc::new(tables.collect::<Vec<_>>());
        let mut rows: Vec<Vec<Row>> = vec![Vec::with_capacity(self.tokens.len()); of.len()];
        for token in &self.tokens {
            let Some(token) = token else {
                rows.iter_mut().for_each(|rows| rows.push(Row::Zero));
                continue;
            };
            let own: Vec<Option<usize>> = of.iter().map(|p| self.row(p, token)).collect();
            let wanted = self.wanted.get(token.as_str());
            let forced = wanted.is_some_and(|w| w.force);
            let other = match wanted.and_then(|w| w.source.as_ref()) {
                _ if !forced && own.iter().all(Option::is_some) => Row::Zero,
                Some(source) => self.chosen(source, token, of, inputs)?,
                None => usual(&own, of.iter().position(|p| Some(p.model) == base)),
            };
            for (table, (own, rows)) in own.iter().zip(&mut rows).enumerate() {
                rows.push(match own {
                    Some(row) if !forced => Row::Of { table, row: *row },
                    _ => other.clone(),
                });
            }
        }
        let table = |(rows, p): (Vec<Row>, &Participant<'_>)| {
            TokenTable::new(tables.clone(), rows, [&[self.rows], &p.shape[1..]].concat())
        };
        Ok(rows.into_iter().zip(of).map(table).collect())
    }

    fn row(&self, p: &Participant<'_>, token: &str) -> Option<usize> {
        self.of_inputs[p.model].row(token, p.shape[0])
    }

    /// Returns the row that the merge file specifies.
    fn chosen(
        &self,
        source: &TokenSource,
        token: &str,
        of: &[Participant<'_>],
        inputs: &Inputs,
    ) -> Result<Row, Problem> {
        let wrong = |kind: TokenizerProblem| Problem::new(Place::Token(token.to_owned()), kind);
        let owned = str::to_owned;
        let table = |written: &str| {
            let found = of.iter().position(|p| inputs.is(p.model, written));
            found.ok_or_else(|| wrong(TokenizerProblem::NotMergedHere { model: owned(written) }))
        };
        match source {
            TokenSource::Kind(TokenKind::Zero) => Ok(Row::Zero),
            TokenSource::Model(written) => {
                let table = table(written)?;
                let row = self.row(&of[table], token);
                let lacking = || wrong(TokenizerProblem::LacksIt { model: owned(written) });
                row.map(|row| Row::Of { table, row }).ok_or_else(lacking)
            }
            TokenSource::Kind(TokenKind::ModelToken { model, token: other, token_id }) => {
                let table = table(model)?;
                let row = match (other, token_id) {
                    (Some(other), None) => self.row(&of[table], other),
                    (None, Some(id)) => Some(*id).filter(|id| *id < of[table].shape[0]),
                    _ => return Err(wrong(TokenizerProblem::TokenOrId)),
                };
                let name = || other.clone().or(token_id.map(|id| id.to_string())).unwrap_or_default();
                let missing = || wrong(TokenizerProblem::NoSuchToken { model: owned(model), token: name() });
                row.map(|row| Row::Of { table, row }).ok_or_else(missing)
            }
        }
    }

    /// Returns the files that replace those of the tokenizer's model, by name.
    ///
    /// # Errors
    /// Returns an error if a file is invalid.
    pub(crate) fn files(&self, inputs: &Inputs) -> Result<BTreeMap<String, Vec<u8>>, Problem> {
        self.new.files(&inputs.models[self.new.model])
    }

    /// Sets the ids of special tokens in `config.json` to those of the output's tokenizer.
    pub(crate) fn put_special_ids(&self, config: &mut Map<String, Value>, inputs: &Inputs) {
        let own = inputs.models[self.new.model].config();
        for (key, value) in config.iter_mut().filter(|(key, _)| key.ends_with("_token_id")) {
            if let Some(id) = own.get(key) {
                *value = id.clone();
            }
        }
        for (key, id) in own.iter().filter(|(key, _)| key.ends_with("_token_id")) {
            config.entry(key.clone()).or_insert_with(|| id.clone());
        }
    }
}

/// Returns the default row for models that lack a token: the only row that exists, or else the base's, or else the mean
/// over the models that have the token; zeros if none has it.
fn usual(own: &[Option<usize>], base: Option<usize>) -> Row {
    let having: Vec<(usize, usize)> =
        own.iter().enumerate().filter_map(|(table, row)| Some((table, (*row)?))).collect();
    match (&having[..], base) {
        ([], _) => Row::Zero,
        ([(table, row)], _) => Row::Of { table: *table, row: *row },
        (_, Some(base)) if own[base].is_some() => Row::Of { table: base, row: own[base].unwrap_or(0) },
        _ => Row::Mean(having),
    }
}

/// Adds the chat template that a merge file requests to the tokenizer files of `model`.
///
/// # Errors
/// Returns an error if a file or the setting is invalid.
pub(crate) fn put_wanted_template(
    config: &MergeConfig,
    inputs: &Inputs,
    model: usize,
    files: &mut BTreeMap<String, Vec<u8>>,
    notes: &mut Vec<String>,
) -> Result<(), Problem> {
    let Some(wanted) = config.chat_template.as_deref() else { return Ok(()) };
    let wrong = |kind: TokenizerProblem| Problem::new(Place::key("chat_template"), kind);
    let template = if wanted == "auto" {
        let mut counts: Vec<(String, usize)> = Vec::new();
        for input in &inputs.models {
            let Some(template) = chat_template(input)?.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()) else {
                continue;
            };
            match counts.iter_mut().find(|(other, _)| *other == template) {
                Some((_, count)) => *count += 1,
                None => counts.push((template, 1)),
            }
        }
        let most = counts.iter().map(|(_, count)| *count).max();
        // If several are equally frequent, the first one in the order of models in the file is used.
        let Some((template, count)) = counts.into_iter().find(|(_, count)| Some(*count) == most) else {
            notes.push("chat_template: no model has one".to_owned());
            return Ok(());
        };
        notes.push(format!("chat_template: that of {count} of {} models", inputs.models.len()));
        template
    } else if let Some(index) = inputs.find(config, wanted) {
        let none = || wrong(TokenizerProblem::NoChatTemplate { model: wanted.to_owned() });
        chat_template(&inputs.models[index])?.ok_or_else(none)?
    } else if wanted.contains('{') {
        wanted.to_owned()
    } else {
        return Err(wrong(TokenizerProblem::ChatTemplate { given: wanted.to_owned() }));
    };
    put_chat_template(files, &template, &inputs.models[model])
}
