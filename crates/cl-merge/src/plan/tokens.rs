//! Tokenizers in the format of `tokenizer.json`: tokens by id, and changed tokenizer files with tokens added or
//! removed.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use cl_checkpoint::files::{MAX_TOKENIZER, read_file, read_text};
use serde_json::{Map, Value, json};

use super::inputs::Input;
use crate::problem::{Place, Problem, TokenizerProblem};

/// The tokens of one model.
pub(crate) struct Tokens {
    /// Ids by token.
    pub(crate) ids: HashMap<String, usize>,
    /// Tokens of the tokenizer's model (`model.vocab`) by id, without those that are also added tokens.
    plain: BTreeMap<usize, String>,
    /// Entries of `added_tokens` by id. These tokens are found in a text before it is split.
    added: BTreeMap<usize, Value>,
    /// Number of tokens of the tokenizer's model.
    of_model: usize,
}

/// A new tokenizer, derived from that of one model by removing or adding tokens.
pub(crate) struct NewTokenizer {
    /// Index of the model whose tokenizer files are used.
    pub(crate) model: usize,
    pub(crate) ids: HashMap<String, usize>,
    /// Entries of `added_tokens` that its files lack, in order.
    new: Vec<(usize, Value)>,
    /// Number of rows of the model's token table; tokens with ids beyond it are removed.
    rows: usize,
}

impl Tokens {
    /// Reads the tokenizer of an input; `None` if it has none.
    ///
    /// # Errors
    /// Returns an error if the file is invalid.
    pub(crate) fn read(input: &Input) -> Result<Option<Tokens>, Problem> {
        let Some(path) = input.companion("tokenizer.json") else { return Ok(None) };
        let value = json_file(&path)?;
        let none = || Problem::new(Place::File(path.clone()), TokenizerProblem::NoTokens);
        Tokens::of(&value).map(Some).ok_or_else(none)
    }

    fn of(value: &Value) -> Option<Tokens> {
        let mut by_id: BTreeMap<usize, String> = match value.pointer("/model/vocab")? {
            Value::Object(map) => {
                map.iter().filter_map(|(token, id)| Some((id.as_u64()? as usize, token.clone()))).collect()
            }
            // In a Unigram model, the position is the id.
            Value::Array(list) => {
                let token = |(id, entry): (usize, &Value)| Some((id, entry.get(0)?.as_str()?.to_owned()));
                list.iter().enumerate().filter_map(token).collect()
            }
            _ => return None,
        };
        let of_model = by_id.len();
        let mut added = BTreeMap::new();
        for token in value.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let id = token.get("id").and_then(Value::as_u64)? as usize;
            by_id.insert(id, token.get("content")?.as_str()?.to_owned());
            added.insert(id, token.clone());
        }
        let ids = by_id.iter().map(|(id, token)| (token.clone(), *id)).collect();
        let plain = by_id.into_iter().filter(|(id, _)| !added.contains_key(id)).collect();
        Some(Tokens { ids, plain, added, of_model })
    }

    /// Returns the row of a token in a table with this number of rows.
    pub(crate) fn row(&self, token: &str, rows: usize) -> Option<usize> {
        self.ids.get(token).copied().filter(|id| *id < rows)
    }
}

impl NewTokenizer {
    /// Takes the tokens of one model, without those that have no row.
    pub(crate) fn of(model: usize, tokens: &Tokens, rows: usize) -> NewTokenizer {
        let ids = tokens.ids.iter().filter(|(_, id)| **id < rows).map(|(token, id)| (token.clone(), *id)).collect();
        NewTokenizer { model, ids, new: Vec::new(), rows }
    }

    /// Takes the tokens of the first model, then those that only later models have: first their models' ordinary
    /// tokens, as added tokens, then their added tokens. Each group is ordered by model and then by id. mergekit uses
    /// the same order, except that within a model it follows a hash table.
    pub(crate) fn union(models: &[(usize, &Tokens, usize)]) -> NewTokenizer {
        let &(first, base, rows) = &models[0];
        let mut new = NewTokenizer::of(first, base, rows);
        let mut next = next_id(base, rows);
        let added_anywhere = |token: &str| {
            models.iter().any(|(_, tokens, rows)| {
                let id = tokens.row(token, *rows);
                id.is_some_and(|id| tokens.added.contains_key(&id))
            })
        };
        for (_, tokens, rows) in &models[1..] {
            for token in tokens.plain.range(..rows).map(|(_, token)| token) {
                if !added_anywhere(token) {
                    new.add(token, &mut next, None);
                }
            }
        }
        for (_, tokens, rows) in &models[1..] {
            for description in tokens.added.range(..rows).map(|(_, description)| description) {
                let token = description["content"].as_str().unwrap_or_default();
                match new.ids.get(token).copied() {
                    None => new.add(token, &mut next, Some(description)),
                    // An ordinary token that is an added token in another model becomes an added token.
                    Some(id) if !base.added.contains_key(&id) && !new.new.iter().any(|(other, _)| *other == id) => {
                        new.new.push((id, described(token, id, Some(description))));
                    }
                    Some(_) => {}
                }
            }
        }
        new
    }

    /// Adds tokens that no tokenizer has.
    pub(crate) fn extend<'t>(&mut self, tokens: &Tokens, wanted: impl Iterator<Item = &'t str>) {
        let mut next = next_id(tokens, self.rows).max(self.new.iter().map(|(id, _)| id + 1).max().unwrap_or(0));
        for token in wanted {
            if !self.ids.contains_key(token) {
                self.add(token, &mut next, None);
            }
        }
    }

    fn add(&mut self, token: &str, next: &mut usize, description: Option<&Value>) {
        if self.ids.contains_key(token) {
            return;
        }
        self.ids.insert(token.to_owned(), *next);
        self.new.push((*next, described(token, *next, description)));
        *next += 1;
    }

    /// Returns the number of ids, including unused ones: the largest id plus one.
    pub(crate) fn len(&self) -> usize {
        self.ids.values().max().map_or(0, |id| id + 1)
    }

    /// Returns the number of tokens that were ordinary tokens in another model and are now matched literally in texts.
    pub(crate) fn literal(&self) -> usize {
        self.new.iter().filter(|(_, token)| token["special"] == false && token["normalized"] == true).count()
    }

    /// Returns the changed files of the model by name.
    ///
    /// # Errors
    /// Returns an error if a file is invalid.
    pub(crate) fn files(&self, input: &Input) -> Result<BTreeMap<String, Vec<u8>>, Problem> {
        let mut files = BTreeMap::new();
        let read = |name: &str| input.companion(name).map(|path| json_file(&path)).transpose();
        let Some(mut tokenizer) = read("tokenizer.json")? else { return Ok(files) };
        let left_out = self.leave_out(&mut tokenizer);
        if self.new.is_empty() && left_out.is_empty() {
            return Ok(files);
        }
        let mut added = tokenizer.get("added_tokens").and_then(Value::as_array).cloned().unwrap_or_default();
        added.extend(self.new.iter().map(|(_, token)| token.clone()));
        added.sort_by_key(|token| token["id"].as_u64());
        tokenizer["added_tokens"] = Value::Array(added);
        files.insert("tokenizer.json".to_owned(), text(&tokenizer));
        let gone = |id: Option<usize>| id.is_some_and(|id| id >= self.rows);
        if let Some(mut config) = read("tokenizer_config.json")? {
            if let Some(decoder) = config.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
                decoder.retain(|id, _| !gone(id.parse().ok()));
                decoder.extend(self.new.iter().map(|(id, token)| (id.to_string(), without_id(token))));
            }
            forget(&mut config, &left_out);
            files.insert("tokenizer_config.json".to_owned(), text(&config));
        }
        if let Some(mut map) = read("special_tokens_map.json")?
            && !left_out.is_empty()
        {
            forget(&mut map, &left_out);
            files.insert("special_tokens_map.json".to_owned(), text(&map));
        }
        if let Some(Value::Object(mut ids)) = read("added_tokens.json")? {
            ids.retain(|_, id| !gone(id.as_u64().map(|id| id as usize)));
            let name = |token: &Value| token["content"].as_str().unwrap_or_default().to_owned();
            ids.extend(self.new.iter().map(|(id, token)| (name(token), json!(id))));
            files.insert("added_tokens.json".to_owned(), text(&Value::Object(ids)));
        }
        Ok(files)
    }

    /// Removes tokens without a row, and the merge rules that produce them; returns the removed tokens.
    fn leave_out(&self, tokenizer: &mut Value) -> Vec<String> {
        let mut gone: Vec<String> = Vec::new();
        let beyond = |id: Option<u64>| id.is_some_and(|id| id as usize >= self.rows);
        match tokenizer.pointer_mut("/model/vocab") {
            Some(Value::Object(vocabulary)) => vocabulary.retain(|token, id| {
                let keep = !beyond(id.as_u64());
                if !keep {
                    gone.push(token.clone());
                }
                keep
            }),
            Some(Value::Array(list)) if list.len() > self.rows => {
                gone.extend(list.drain(self.rows..).map(|entry| entry[0].as_str().unwrap_or_default().to_owned()));
            }
            _ => {}
        }
        if let Some(Value::Array(merges)) = tokenizer.pointer_mut("/model/merges")
            && !gone.is_empty()
        {
            merges.retain(|merge| {
                let parts: Vec<&str> = match merge {
                    Value::String(pair) => pair.split(' ').collect(),
                    Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect(),
                    _ => Vec::new(),
                };
                let made = parts.concat();
                !gone.iter().any(|token| *token == made || parts.contains(&token.as_str()))
            });
        }
        if let Some(Value::Array(added)) = tokenizer.get_mut("added_tokens") {
            let left_out = added.iter().filter(|token| beyond(token["id"].as_u64()));
            gone.extend(left_out.map(|token| token["content"].as_str().unwrap_or_default().to_owned()));
            added.retain(|token| !beyond(token["id"].as_u64()));
        }
        gone
    }
}

/// Removes tokens from the special tokens of a file, because Transformers would add them again.
fn forget(file: &mut Value, tokens: &[String]) {
    let is_gone = |token: &Value| {
        let content = token.as_str().or_else(|| token.get("content")?.as_str());
        content.is_some_and(|content| tokens.iter().any(|gone| gone == content))
    };
    let Some(file) = file.as_object_mut() else { return };
    for (key, value) in file.iter_mut() {
        match value {
            Value::Array(list) if key.ends_with("special_tokens") => list.retain(|token| !is_gone(token)),
            Value::Object(named) if key.ends_with("special_tokens") => named.retain(|_, token| !is_gone(token)),
            _ => {}
        }
    }
    // Keys such as `pad_token`, whose value is a string or an object.
    file.retain(|key, value| !(key.ends_with("_token") && is_gone(value)));
}

/// Returns the id of the next added token: after the model's own tokens and all added tokens.
fn next_id(tokens: &Tokens, rows: usize) -> usize {
    let of_model = tokens.of_model.min(rows);
    of_model.max(tokens.added.range(..rows).next_back().map_or(0, |(id, _)| id + 1))
}

/// Returns an entry of `added_tokens`. Without a description, it has the defaults of Transformers' `add_tokens`.
fn described(token: &str, id: usize, description: Option<&Value>) -> Value {
    let mut entry = Map::new();
    entry.insert("id".to_owned(), id.into());
    entry.insert("content".to_owned(), token.into());
    let flag = |key: &str| description.and_then(|d| d.get(key)?.as_bool());
    for (key, default) in
        [("single_word", false), ("lstrip", false), ("rstrip", false), ("normalized", true), ("special", false)]
    {
        entry.insert(key.to_owned(), flag(key).unwrap_or(default).into());
    }
    Value::Object(entry)
}

fn without_id(token: &Value) -> Value {
    let fields = token.as_object().into_iter().flatten().filter(|(key, _)| *key != "id");
    Value::Object(fields.map(|(key, value)| (key.clone(), value.clone())).collect())
}

fn json_file(path: &Path) -> Result<Value, Problem> {
    let bytes = read_file(path, MAX_TOKENIZER).map_err(|error| Problem::unopened(path, error))?;
    let wrong = |error| Problem::new(Place::File(path.to_owned()), TokenizerProblem::Json(error));
    serde_json::from_slice(&bytes).map_err(wrong)
}

fn text(value: &Value) -> Vec<u8> {
    (serde_json::to_string_pretty(value).unwrap_or_default() + "\n").into_bytes()
}

/// Reads the chat template of a model, from its own file or from `tokenizer_config.json`. If there are several named
/// templates, `default` is used.
///
/// # Errors
/// Returns an error if a file is invalid.
pub(crate) fn chat_template(input: &Input) -> Result<Option<String>, Problem> {
    if let Some(path) = input.companion("chat_template.jinja") {
        return read_text(&path, MAX_TOKENIZER).map(Some).map_err(|error| Problem::unopened(&path, error));
    }
    let Some(path) = input.companion("tokenizer_config.json") else { return Ok(None) };
    Ok(match json_file(&path)?.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|template| template["name"] == "default");
            default.and_then(|template| template["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    })
}

/// Writes a chat template to the files of a tokenizer: to `chat_template.jinja`, which takes precedence in
/// Transformers, and only there.
///
/// # Errors
/// Returns an error if a file is invalid.
pub(crate) fn put_chat_template(
    files: &mut BTreeMap<String, Vec<u8>>,
    template: &str,
    input: &Input,
) -> Result<(), Problem> {
    const CONFIG: &str = "tokenizer_config.json";
    let config = match (files.get(CONFIG), input.companion(CONFIG)) {
        (Some(bytes), _) => serde_json::from_slice(bytes).ok(),
        (None, Some(path)) => Some(json_file(&path)?),
        (None, None) => None,
    };
    if let Some(Value::Object(mut config)) = config
        && config.shift_remove("chat_template").is_some()
    {
        files.insert(CONFIG.to_owned(), text(&Value::Object(config)));
    }
    files.insert("chat_template.jinja".to_owned(), template.as_bytes().to_vec());
    Ok(())
}
