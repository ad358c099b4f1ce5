//! Tokenizers as in `tokenizer.json`: tokens by id, and tokenizer files with tokens added or removed.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use cl_checkpoint::files::{MAX_TOKENIZER, read_file, read_text};
use serde_json::{Map, Value, json};

use super::inputs::Input;
use crate::problem::{Place, Problem, TokenizerProblem};

/// The tokens of a model.
pub(crate) struct Tokens {
    /// Numbers by token.
    pub(crate) ids: HashMap<String, usize>,
    /// Tokens of the model that splits words, by number, without those that are added tokens too.
    plain: BTreeMap<usize, String>,
    /// Tokens that are found in a text before it is split, as the file describes them, by number.
    added: BTreeMap<usize, Value>,
    /// Tokens of the model that splits words.
    of_model: usize,
}

/// A new tokenizer: one of the models', with tokens left out or added.
pub(crate) struct NewTokenizer {
    /// The model whose files it is made of.
    pub(crate) model: usize,
    pub(crate) ids: HashMap<String, usize>,
    /// Added tokens that its files lack, in order.
    new: Vec<(usize, Value)>,
    /// Numbers from this one on have no row in the model, and are left out.
    rows: usize,
}

impl Tokens {
    /// Reads the tokenizer of an input; `None` where it has none.
    ///
    /// # Errors
    /// Returns what is wrong with the file.
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
            // Unigram: the place is the number.
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

    /// The row of a token in a table with so many.
    pub(crate) fn row(&self, token: &str, rows: usize) -> Option<usize> {
        self.ids.get(token).copied().filter(|id| *id < rows)
    }
}

impl NewTokenizer {
    /// The tokens of one model, those left out that have no row.
    pub(crate) fn of(model: usize, tokens: &Tokens, rows: usize) -> NewTokenizer {
        let ids = tokens.ids.iter().filter(|(_, id)| **id < rows).map(|(token, id)| (token.clone(), *id)).collect();
        NewTokenizer { model, ids, new: Vec::new(), rows }
    }

    /// The tokens of the first model, then those that only later ones have: first what their models split words into, as added
    /// tokens, then their added tokens. In each the order is that of models, then of numbers, as mergekit does, whose own order
    /// in a model is that of a hash table.
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
                    // A token that words are split into, and an added one elsewhere: it is found in texts from now on.
                    Some(id) if !base.added.contains_key(&id) && !new.new.iter().any(|(other, _)| *other == id) => {
                        new.new.push((id, described(token, id, Some(description))));
                    }
                    Some(_) => {}
                }
            }
        }
        new
    }

    /// Adds tokens that nobody has.
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

    /// Numbers that the tokenizer gives: the largest and one.
    pub(crate) fn len(&self) -> usize {
        self.ids.values().max().map_or(0, |id| id + 1)
    }

    /// Tokens that words were split into in another model, and are found in texts as they stand now.
    pub(crate) fn literal(&self) -> usize {
        self.new.iter().filter(|(_, token)| token["special"] == false && token["normalized"] == true).count()
    }

    /// Files of the model that change, by name.
    ///
    /// # Errors
    /// Returns what is wrong with a file.
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

    /// Removes tokens without a row, and rules that make them; returns them.
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

/// Removes tokens from the special tokens of a file: Transformers would add them again.
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
    // `pad_token` and others, as text or with their properties.
    file.retain(|key, value| !(key.ends_with("_token") && is_gone(value)));
}

/// The number of the next added token: after the model's own, and after all that were added.
fn next_id(tokens: &Tokens, rows: usize) -> usize {
    let of_model = tokens.of_model.min(rows);
    of_model.max(tokens.added.range(..rows).next_back().map_or(0, |(id, _)| id + 1))
}

/// An entry of `added_tokens`; without a description what `add_tokens` of Transformers makes of a text.
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

/// The chat template of a model: a file of its own, or in `tokenizer_config.json`, where several have names and one of them is
/// called `default`.
///
/// # Errors
/// Returns what is wrong with a file.
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

/// Puts a chat template among the files of a tokenizer: in `chat_template.jinja`, which wins in Transformers, and nowhere else.
///
/// # Errors
/// Returns what is wrong with a file.
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
