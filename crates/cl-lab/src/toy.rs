//! A synthetic benchmark generated from a seed: facts for pretraining, tasks to train on in sequence, and a tokenizer.
//!
//! It replaces a pretrained model and real data in the examples, the built-in experiment and the tests. The model is
//! pretrained on the facts, and on the tasks' questions with random answers: like a pretrained model, it then knows the
//! vocabulary and the form of the questions, but not the tasks. A two-layer transformer learns each task in seconds,
//! and learning one task interferes with the others, which is what the experiment measures.

use std::path::Path;

use cl_checkpoint::seed::fnv1a;
use cl_data::Example;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};

use crate::LabError;

/// A task with training and test examples.
pub struct ToyTask {
    /// Its name.
    pub name: &'static str,
    /// Training examples.
    pub train: Vec<Example>,
    /// Test examples; their prompts do not occur in training.
    pub test: Vec<Example>,
}

/// A multiple-choice question, in `cl-eval`'s format.
#[derive(Clone, Debug, Serialize)]
pub struct Question {
    /// The question.
    pub query: String,
    /// The choices.
    pub choices: Vec<String>,
    /// Index of the correct choice.
    pub gold: usize,
}

/// Facts that the model is pretrained on.
pub struct Facts {
    /// Each fact once, as a question with its answer.
    pub examples: Vec<Example>,
    /// Questions about the facts, by name of the set of facts.
    pub questions: Vec<(&'static str, Vec<Question>)>,
}

const SUBJECTS: [&str; 40] = [
    "alba", "bero", "cito", "dana", "elmo", "fira", "gino", "hela", "ivor", "juna", "kato", "lira", "mavi", "nilo",
    "orso", "pela", "quin", "rosa", "sami", "tora", "udo", "vera", "wido", "xena", "yara", "zeno", "arno", "bina",
    "cora", "dino", "ezra", "fina", "gala", "hugo", "inka", "jano", "kira", "leto", "mika", "nora",
];
const PLACES: [&str; 8] = ["rome", "oslo", "lima", "cairo", "delhi", "kyoto", "paris", "quito"];
const COLOURS: [&str; 8] = ["red", "blue", "green", "black", "white", "brown", "grey", "pink"];
const LETTERS: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
const MOODS: [(&str, [&str; 6]); 3] = [
    ("A", ["glad", "merry", "proud", "calm", "bright", "sunny"]),
    ("B", ["sad", "gloomy", "angry", "bitter", "dark", "sour"]),
    ("C", ["plain", "usual", "even", "common", "middling", "flat"]),
];
const NOUNS: [&str; 10] = ["day", "song", "street", "letter", "house", "river", "market", "story", "garden", "winter"];
const FRAME: [&str; 15] = [
    "where", "does", "live", "which", "colour", "like", "?", ":", "first", "last", "largest", "of", "mood", "the", "is",
];

/// Generates the facts: where each subject lives, and which colour it likes.
pub fn facts(seed: u64) -> Facts {
    let mut rng = rng(seed, "facts");
    let mut examples = Vec::new();
    let mut homes = Vec::new();
    let mut colours = Vec::new();
    for subject in SUBJECTS {
        let sets: [(&[&str], String, &mut Vec<Question>); 2] = [
            (&PLACES, format!("where does {subject} live ?"), &mut homes),
            (&COLOURS, format!("which colour does {subject} like ?"), &mut colours),
        ];
        for (objects, query, questions) in sets {
            let gold = below(&mut rng, objects.len());
            let choices = objects.iter().map(|o| (*o).to_owned()).collect();
            examples.push(Example::pair(query.clone(), objects[gold]));
            questions.push(Question { query, choices, gold });
        }
    }
    Facts { examples, questions: vec![("homes", homes), ("colours", colours)] }
}

/// A question of a task, its answer, and all plausible answers.
struct Drawn {
    prompt: String,
    answer: &'static str,
    plausible: Vec<&'static str>,
}

type Maker = fn(&mut ChaCha8Rng) -> Drawn;

const MAKERS: [(&str, Maker); 4] = [("first", first), ("mood", mood), ("largest", largest), ("last", last)];

/// Generates the pretraining data: every fact four times, and `questions` questions per task, each with a random
/// plausible answer.
pub fn pretraining(seed: u64, questions: usize) -> Vec<Example> {
    let mut rng = rng(seed, "pretraining");
    let facts = facts(seed).examples;
    let mut examples: Vec<Example> = facts.iter().cycle().take(4 * facts.len()).cloned().collect();
    for (_, make) in MAKERS {
        for _ in 0..questions {
            let drawn = make(&mut rng);
            let answer = drawn.plausible[below(&mut rng, drawn.plausible.len())].to_owned();
            examples.push(Example::pair(drawn.prompt, answer));
        }
    }
    examples
}

/// Generates the tasks, in training order: `first`, `mood`, `largest`, `last`.
pub fn tasks(seed: u64, train: usize, test: usize) -> Vec<ToyTask> {
    MAKERS
        .into_iter()
        .map(|(name, make)| {
            let mut rng = rng(seed, name);
            let mut seen = std::collections::HashSet::new();
            let mut all = Vec::with_capacity(train + test);
            // A task has hundreds of prompts; the bound only prevents an endless loop on an impossible request.
            for _ in 0..(train + test) * 50 {
                let drawn = make(&mut rng);
                if all.len() < train + test && seen.insert(drawn.prompt.clone()) {
                    all.push(Example::pair(drawn.prompt, drawn.answer));
                }
            }
            let test = all.split_off(train.min(all.len()));
            ToyTask { name, train: all, test }
        })
        .collect()
}

fn first(rng: &mut ChaCha8Rng) -> Drawn {
    let row = draw(rng, &LETTERS, 4);
    Drawn { prompt: format!("first of {} :", row.join(" ")), answer: row[0], plausible: row }
}

fn last(rng: &mut ChaCha8Rng) -> Drawn {
    let row = draw(rng, &LETTERS, 4);
    Drawn { prompt: format!("last of {} :", row.join(" ")), answer: row[3], plausible: row }
}

fn largest(rng: &mut ChaCha8Rng) -> Drawn {
    let row = draw(rng, &DIGITS, 3);
    let answer = row.iter().max().expect("three digits");
    Drawn { prompt: format!("largest of {} :", row.join(" ")), answer, plausible: row }
}

fn mood(rng: &mut ChaCha8Rng) -> Drawn {
    let (answer, words) = MOODS[below(rng, MOODS.len())];
    let nouns = draw(rng, &NOUNS, 2);
    let word = words[below(rng, words.len())];
    let prompt = format!("mood of the {} {word} {} :", nouns[0], nouns[1]);
    Drawn { prompt, answer, plausible: MOODS.map(|m| m.0).to_vec() }
}

/// Writes `tokenizer.json` and `tokenizer_config.json`: one token per word, with BOS.
///
/// # Errors
/// Returns [`LabError::Io`] if a file cannot be written.
pub fn write_tokenizer(dir: &Path) -> Result<(), LabError> {
    for (name, value) in tokenizer_files() {
        let path = dir.join(name);
        std::fs::write(&path, value).map_err(LabError::io(&path))?;
    }
    Ok(())
}

/// Returns the tokenizer's files, as pairs of name and content.
pub fn tokenizer_files() -> Vec<(String, Vec<u8>)> {
    word_tokenizer(&vocabulary(), 64)
}

/// Returns a tokenizer with one token per word, for texts of at most `max_length` tokens. The first three words must be
/// `<unk>`, `<s>` and `</s>`.
pub(crate) fn word_tokenizer<W: AsRef<str>>(words: &[W], max_length: usize) -> Vec<(String, Vec<u8>)> {
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(i, w)| (w.as_ref().to_owned(), Value::from(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": max_length, "clean_up_tokenization_spaces": false
    });
    vec![("tokenizer.json".to_owned(), pretty(&tokenizer)), ("tokenizer_config.json".to_owned(), pretty(&config))]
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("JSON values can be written");
    text.push(b'\n');
    text
}

/// Returns `config.json` of a small Llama model: two layers with hidden size `hidden`, and tied embeddings.
pub fn model_config(hidden: usize) -> serde_json::Map<String, Value> {
    small_llama(vocabulary().len(), hidden, 64)
}

/// Returns `config.json` of a two-layer Llama model with tied embeddings, for texts of at most `max_length` tokens.
pub(crate) fn small_llama(vocabulary: usize, hidden: usize, max_length: usize) -> serde_json::Map<String, Value> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary,
        "hidden_size": hidden, "intermediate_size": hidden * 2, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": max_length, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"
    });
    match config {
        Value::Object(map) => map,
        _ => unreachable!("the literal above is an object"),
    }
}

fn vocabulary() -> Vec<&'static str> {
    let mut words = vec!["<unk>", "<s>", "</s>"];
    words.extend(FRAME);
    words.extend(SUBJECTS);
    words.extend(PLACES);
    words.extend(COLOURS);
    words.extend(LETTERS);
    words.extend(DIGITS);
    for (label, mood) in MOODS {
        words.push(label);
        words.extend(mood);
    }
    words.extend(NOUNS);
    words
}

pub(crate) fn rng(seed: u64, name: &str) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(fnv1a(seed, name))
}

pub(crate) fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    // The modulo bias is below 2⁻⁵⁹ for these sizes.
    (rng.next_u64() % n as u64) as usize
}

fn draw(rng: &mut ChaCha8Rng, from: &[&'static str], n: usize) -> Vec<&'static str> {
    (0..n).map(|_| from[below(rng, from.len())]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_in_the_vocabulary_once() {
        let words = vocabulary();
        let known: std::collections::HashSet<&str> = words.iter().copied().collect();
        assert_eq!(known.len(), words.len());
        let before = pretraining(3, 20);
        let tasks = tasks(3, 30, 10);
        let examples = tasks.iter().flat_map(|t| t.train.iter().chain(&t.test)).chain(&before);
        for example in examples {
            for word in example.shown().split(' ').chain(example.answer().split(' ')) {
                assert!(known.contains(word), "{word}");
            }
        }
    }

    #[test]
    fn the_seed_decides_and_tests_are_new() {
        let (a, b) = (tasks(1, 20, 10), tasks(2, 20, 10));
        assert_eq!(a[0].train, tasks(1, 20, 10)[0].train);
        assert_ne!(a[0].train, b[0].train);
        for task in &a {
            assert_eq!((task.train.len(), task.test.len()), (20, 10), "{}", task.name);
            assert!(task.test.iter().all(|t| task.train.iter().all(|e| e.shown() != t.shown())));
        }
    }
}
