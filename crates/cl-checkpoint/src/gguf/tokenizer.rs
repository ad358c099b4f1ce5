//! Creates `tokenizer.json` and related files from the keys `tokenizer.*`.
//!
//! The file contains vocabulary and merges, but only the name of the rule that splits text into pieces before merging
//! (`tokenizer.ggml.pre`). The rules are those of the models' published `tokenizer.json` files.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::{Error, GgufFile, KeyProblem};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";

// Values of `tokenizer.ggml.token_type`; 1 is a normal token, 5 an unused one.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// The files of a tokenizer.
pub(super) struct Tokenizer {
    /// `tokenizer.json`.
    pub(super) json: Value,
    /// `tokenizer_config.json`.
    pub(super) config: Value,
    /// `special_tokens_map.json`.
    pub(super) special_tokens_map: Value,
    pub(super) ids: SpecialIds,
    /// Number of tokens.
    pub(super) tokens: usize,
    /// Assumptions that were made.
    pub(super) notes: Vec<String>,
}

/// Ids of special tokens.
pub(super) struct SpecialIds {
    pub(super) bos: Option<usize>,
    pub(super) eos: Option<usize>,
    pub(super) eot: Option<usize>,
    unk: Option<usize>,
    pad: Option<usize>,
}

impl SpecialIds {
    /// Returns the ids with their names in `config.json`.
    pub(super) fn named(&self) -> [(&'static str, Option<usize>); 3] {
        [("bos_token_id", self.bos), ("eos_token_id", self.eos), ("pad_token_id", self.pad)]
    }

    fn roles(&self) -> [(&'static str, Option<usize>); 4] {
        [("bos_token", self.bos), ("eos_token", self.eos), ("unk_token", self.unk), ("pad_token", self.pad)]
    }

    /// Reads the ids. SentencePiece files may omit the trainer's default ids: unk 0, bos 1, eos 2.
    fn read(file: &GgufFile, tokens: usize, sentencepiece: bool) -> Result<SpecialIds, Error> {
        let id = |name: &str, default: usize| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let stated = file.uint(&key)?.filter(|&id| id != u32::MAX as usize); // llama.cpp's "none"
            if let Some(id) = stated.filter(|&id| id >= tokens) {
                return Err(file.key_error(&key, KeyProblem::TokenId { id, tokens }));
            }
            Ok(stated.or((sentencepiece && default < tokens).then_some(default)))
        };
        let none = usize::MAX;
        Ok(SpecialIds {
            bos: id("bos", 1)?,
            eos: id("eos", 2)?,
            unk: id("unknown", 0)?,
            pad: id("padding", none)?,
            eot: id("eot", none)?,
        })
    }
}

/// How text is split before merging, for byte-level BPE.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Split {
    Gpt2,
    Smollm,
    Llama3,
    Qwen2,
}

impl Split {
    /// Names in `tokenizer.ggml.pre`. `default` is GPT-2's rule, as Transformers interprets it.
    const NAMES: [(&'static str, Split); 8] = [
        ("default", Split::Gpt2),
        ("gpt-2", Split::Gpt2),
        ("smollm", Split::Smollm),
        ("llama-bpe", Split::Llama3),
        ("llama3", Split::Llama3),
        ("llama-v3", Split::Llama3),
        ("qwen2", Split::Qwen2),
        ("deepseek-r1-qwen", Split::Qwen2),
    ];

    /// Returns the pattern. Llama 3 groups digits in threes, Qwen 2 takes them one by one; the rest is the same.
    fn pattern(digits: &str) -> String {
        let contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
        let words = r"[^\r\n\p{L}\p{N}]?\p{L}+";
        let other = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        format!("{contractions}|{words}|{digits}|{other}")
    }

    fn pre_tokenizer(self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |digits| {
            let pattern = Split::pattern(digits);
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
        };
        let sequence = |first, second| json!({"type": "Sequence", "pretokenizers": [first, second]});
        match self {
            Split::Gpt2 => bytes(true),
            Split::Smollm => sequence(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
            Split::Llama3 => sequence(split(r"\p{N}{1,3}"), bytes(false)),
            Split::Qwen2 => sequence(split(r"\p{N}"), bytes(false)),
        }
    }
}

/// The parts in which the two kinds of tokenizer differ.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    merges: Vec<(String, String)>,
    unk_token: Option<String>,
    byte_fallback: bool,
    ignore_merges: bool,
    add_bos: bool,
}

impl Tokenizer {
    /// Reads and checks all keys. `vocab` is the number of rows of the embedding, `context` the maximum input length.
    pub(super) fn read(file: &GgufFile, vocab: usize, context: usize) -> Result<Tokenizer, Error> {
        let model = required(file, MODEL, file.string(MODEL)?)?;
        let tokens = required(file, TOKENS, file.strings(TOKENS)?)?;
        if tokens.is_empty() {
            return Err(file.key_error(TOKENS, KeyProblem::NoTokens));
        }
        if tokens.len() > vocab {
            let problem = KeyProblem::MoreTokens { tokens: tokens.len(), rows: vocab };
            return Err(file.key_error(TOKENS, problem));
        }
        let index = index(file, &tokens)?;
        let types = types(file, tokens.len())?;
        let ids = SpecialIds::read(file, tokens.len(), model == "llama")?;
        let mut notes = Vec::new();
        let parts = match model {
            "gpt2" => byte_level(file, &index, &mut notes)?,
            "llama" => sentencepiece(file, &tokens, &index, &types, &ids)?,
            other => return Err(unsupported(file, MODEL, other, vec!["gpt2", "llama"])),
        };
        let add_bos = file.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.add_bos);
        let add_eos = file.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let text = |id: Option<usize>| id.map(|id| tokens[id]);
        let bos = added(file, "bos", add_bos, text(ids.bos))?;
        let eos = added(file, "eos", add_eos, text(ids.eos))?;
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added_tokens(&tokens, &types, &ids),
            "normalizer": parts.normalizer,
            "pre_tokenizer": parts.pre_tokenizer,
            "post_processor": post_processor(bos.zip(ids.bos), eos.zip(ids.eos)),
            "decoder": parts.decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": parts.unk_token,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": parts.byte_fallback,
                "byte_fallback": parts.byte_fallback,
                "ignore_merges": parts.ignore_merges,
                "vocab": tokens.iter().enumerate().map(|(i, t)| ((*t).to_owned(), i.into())).collect::<Map<_, _>>(),
                "merges": parts.merges.into_iter().map(|(a, b)| json!([a, b])).collect::<Vec<_>>(),
            },
        });
        let roles = ids.roles().into_iter().filter_map(|(role, id)| Some((role.to_owned(), tokens[id?].into())));
        let special_tokens_map = Value::Object(roles.collect());
        let config = tokenizer_config(file, &special_tokens_map, add_bos, add_eos, context)?;
        Ok(Tokenizer { json, config, special_tokens_map, ids, tokens: tokens.len(), notes })
    }
}

fn required<T>(file: &GgufFile, key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| Error::MissingKey { path: file.path().to_owned(), key: key.to_owned() })
}

fn unsupported(file: &GgufFile, key: &'static str, name: &str, supported: Vec<&'static str>) -> Error {
    Error::Tokenizer { path: file.path().to_owned(), key, name: name.to_owned(), supported }
}

fn index<'t>(file: &GgufFile, tokens: &[&'t str]) -> Result<HashMap<&'t str, usize>, Error> {
    let mut index = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = index.insert(*token, id) {
            let problem = KeyProblem::TokenTwice { first, second: id, token: (*token).to_owned() };
            return Err(file.key_error(TOKENS, problem));
        }
    }
    Ok(index)
}

fn types(file: &GgufFile, tokens: usize) -> Result<Vec<i32>, Error> {
    match file.ints(TYPES)? {
        None => Ok(vec![1; tokens]),
        Some(types) if types.len() == tokens => Ok(types),
        Some(types) => Err(file.key_error(TYPES, KeyProblem::TypeCount { types: types.len(), tokens })),
    }
}

/// Byte-level BPE, with `tokenizer.ggml.model` = `gpt2`.
fn byte_level(file: &GgufFile, index: &HashMap<&str, usize>, notes: &mut Vec<String>) -> Result<Parts, Error> {
    let pre = file.string(PRE)?.unwrap_or_else(|| {
        notes.push(format!(
            "`{PRE}` is missing; text is split as GPT-2 does, which may not be what the model was trained with"
        ));
        "default"
    });
    let split = Split::NAMES.iter().find(|row| row.0 == pre).map(|row| row.1);
    let split = split.ok_or_else(|| unsupported(file, PRE, pre, Split::NAMES.map(|row| row.0).to_vec()))?;
    let merges = required(file, MERGES, merges(file, index)?)?;
    Ok(Parts {
        normalizer: if split == Split::Qwen2 { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: split.pre_tokenizer(),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        merges,
        unk_token: None,
        byte_fallback: false,
        // Llama 3's vocabulary contains whole words that no sequence of merges produces.
        ignore_merges: split == Split::Llama3,
        add_bos: split == Split::Llama3,
    })
}

/// SentencePiece BPE, with `tokenizer.ggml.model` = `llama`: a space is put before the text, even if it starts with
/// one; spaces become `▁`; unknown characters fall back to their bytes. Published files express this with a normalizer
/// or with the pre-tokenizer `Metaspace`; only the normalizer keeps a leading space of the text itself.
fn sentencepiece(
    file: &GgufFile,
    tokens: &[&str],
    index: &HashMap<&str, usize>,
    types: &[i32],
    ids: &SpecialIds,
) -> Result<Parts, Error> {
    if let Some(pre) = file.string(PRE)?.filter(|&pre| pre != "default") {
        return Err(unsupported(file, PRE, pre, vec!["default (for the tokenizer model `llama`)"]));
    }
    let merges = match merges(file, index)? {
        Some(merges) => merges,
        None => implied_merges(tokens, index, types, &scores(file, tokens.len())?),
    };
    let prefix = file.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers = if prefix { vec![json!({"type": "Prepend", "prepend": "▁"}), spaces] } else { vec![spaces] };
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        merges,
        unk_token: ids.unk.map(|id| tokens[id].to_owned()),
        byte_fallback: true,
        ignore_merges: false,
        add_bos: true,
    })
}

/// Returns the stated merges. Both halves and the result must be tokens.
fn merges(file: &GgufFile, index: &HashMap<&str, usize>) -> Result<Option<Vec<(String, String)>>, Error> {
    let Some(lines) = file.strings(MERGES)? else { return Ok(None) };
    let mut merges = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        let halves = line.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '));
        let merge = || (*line).to_owned();
        let wrong = |problem| file.key_error(MERGES, problem);
        let (a, b) = halves.ok_or_else(|| wrong(KeyProblem::Merge { index: i, merge: merge() }))?;
        if ![a, b, &format!("{a}{b}")].iter().all(|token| index.contains_key(token)) {
            return Err(wrong(KeyProblem::MergeTokens { index: i, merge: merge() }));
        }
        merges.push((a.to_owned(), b.to_owned()));
    }
    Ok(Some(merges))
}

fn scores(file: &GgufFile, tokens: usize) -> Result<Vec<f32>, Error> {
    let scores = required(file, SCORES, file.floats(SCORES)?)?;
    if scores.len() != tokens {
        return Err(file.key_error(SCORES, KeyProblem::ScoreCount { scores: scores.len(), tokens }));
    }
    if let Some(index) = scores.iter().position(|s| s.is_nan()) {
        return Err(file.key_error(SCORES, KeyProblem::Score { index }));
    }
    Ok(scores)
}

/// Derives merges from scores. SentencePiece joins the neighbours that form the token with the highest score, so every
/// way to split a token into two tokens is a merge, ordered by descending score. Control, unknown and byte tokens are
/// never the result of a merge.
fn implied_merges(
    tokens: &[&str],
    index: &HashMap<&str, usize>,
    types: &[i32],
    scores: &[f32],
) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if matches!(types[id], CONTROL | UNKNOWN | BYTE) {
            continue;
        }
        let mut ways: Vec<(usize, usize, &str, &str)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (a, b) = token.split_at(at);
                Some((*index.get(a)?, *index.get(b)?, a, b))
            })
            .collect();
        ways.sort_unstable_by_key(|way| (way.0, way.1));
        // Adding zero turns −0, the score of the first merge, into 0.
        merges.extend(ways.into_iter().map(|(_, _, a, b)| (scores[id] + 0.0, a, b)));
    }
    // Equal scores are ordered as in Transformers: longer left half first, then longer right half, then vocabulary
    // order.
    let lengths = |a: &str, b: &str| (a.chars().count(), b.chars().count());
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| lengths(y.1, y.2).cmp(&lengths(x.1, x.2))));
    merges.into_iter().map(|(_, a, b)| (a.to_owned(), b.to_owned())).collect()
}

/// Returns the tokens that are matched in text before anything else. Control tokens and those with a role are special
/// (skipped when decoding with `skip_special_tokens`); user-defined ones are not.
fn added_tokens(tokens: &[&str], types: &[i32], ids: &SpecialIds) -> Vec<Value> {
    let roles: HashSet<usize> = ids.roles().into_iter().filter_map(|role| role.1).collect();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let special = types[id] == CONTROL || roles.contains(&id);
        if (special || types[id] == USER_DEFINED) && !token.is_empty() {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
    }
    added
}

/// Returns the token that is added before or after every text, if this is requested.
fn added<'t>(file: &GgufFile, role: &str, wanted: bool, token: Option<&'t str>) -> Result<Option<&'t str>, Error> {
    match (wanted, token) {
        (false, _) => Ok(None),
        (true, Some(token)) => Ok(Some(token)),
        (true, None) => {
            Err(Error::MissingKey { path: file.path().to_owned(), key: format!("tokenizer.ggml.{role}_token_id") })
        }
    }
}

fn post_processor(bos: Option<(&str, usize)>, eos: Option<(&str, usize)>) -> Value {
    let special = |token: Option<(&str, usize)>, part: usize| {
        token.map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": part}}))
    };
    let text = |part: usize| {
        let name = ["A", "B"][part];
        let text = json!({"Sequence": {"id": name, "type_id": part}});
        [special(bos, part), Some(text), special(eos, part)].into_iter().flatten()
    };
    let entry = |(token, id): (&str, usize)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
    json!({
        "type": "TemplateProcessing",
        "single": text(0).collect::<Vec<_>>(),
        "pair": text(0).chain(text(1)).collect::<Vec<_>>(),
        "special_tokens": bos.into_iter().chain(eos).map(entry).collect::<Map<_, _>>(),
    })
}

fn tokenizer_config(
    file: &GgufFile,
    special_tokens: &Value,
    add_bos: bool,
    add_eos: bool,
    context: usize,
) -> Result<Value, Error> {
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": false,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    });
    for (role, token) in special_tokens.as_object().into_iter().flatten() {
        config[role] = token.clone();
    }
    if let Some(template) = file.string("tokenizer.chat_template")? {
        config["chat_template"] = template.into();
    }
    Ok(config)
}
