//! Loss and perplexity of files.

use cl_checkpoint::Interrupt;
use cl_data::{Encoding, Example, Profile, load};
use cl_lab::{LabError, LoadedModel, Perplexity, PerplexityOptions, perplexity};
use cl_model::token_log_probs;
use cl_torch::tch::{Device, Kind};
use cl_train::Precision;
use serde_json::json;

use crate::world::World;

fn measured(world: &World, rows: &[serde_json::Value], max_length: Option<usize>) -> Result<Perplexity, LabError> {
    let path = world.path("rows.jsonl");
    std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let loaded = LoadedModel::open(&world.path("model"), None, Precision::F32, None, Device::Cpu).unwrap();
    let data = load(&path, cl_data::Format::Auto).unwrap();
    let options = PerplexityOptions { max_length, batch_tokens: 16 };
    perplexity(&loaded, None, &data, options, &Interrupt::default())
}

/// Sum of the log-probabilities of all tokens but the first.
fn sum(loaded: &LoadedModel, ids: &[u32]) -> f64 {
    token_log_probs(&loaded.model, &[ids]).unwrap()[0].iter().map(|(value, _)| value).sum()
}

#[test]
fn plain_text_is_predicted_from_its_first_token_on_in_windows() {
    let world = World::new(Kind::Float);
    let loaded = LoadedModel::open(&world.path("model"), None, Precision::F32, None, Device::Cpu).unwrap();
    let text = "where does ann live ? where does bob live ?";
    let ids = loaded.tokenizer.encode(text, false).unwrap();
    let start = loaded.tokenizer.bos_id().or(loaded.tokenizer.eos_id()).unwrap();
    let whole: Vec<u32> = std::iter::once(start).chain(ids.iter().copied()).collect();

    let found = measured(&world, &[json!({"text": text}), json!({"text": "bob"})], None).unwrap();
    let other = [vec![start], loaded.tokenizer.encode("bob", false).unwrap()].concat();
    let nats = -(sum(&loaded, &whole) + sum(&loaded, &other));
    assert_eq!((found.documents, found.tokens), (2, ids.len() + other.len() - 1));
    assert!((found.loss - nats / found.tokens as f64).abs() < 1e-5, "{found:?}");
    let of_text = found.text.unwrap();
    assert_eq!((of_text.words, of_text.bytes), (11, text.len() + 3));
    assert!((of_text.word_perplexity.ln() - nats / 11.0).abs() < 1e-5);
    assert!((of_text.bits_per_byte * 2f64.ln() - of_text.byte_perplexity.ln()).abs() < 1e-12);

    // Two windows of six: the second one sees the end of the first.
    assert!(ids.len() > 6 && ids.len() < 12, "{}", ids.len());
    let found = measured(&world, &[json!({"text": text})], Some(6)).unwrap();
    let second = &whole[whole.len() - 7..];
    let predicted_before = 6 - (ids.len() - 6);
    let scored = token_log_probs(&loaded.model, &[second]).unwrap().remove(0);
    let second: f64 = scored[predicted_before..].iter().map(|(value, _)| value).sum();
    let nats = -(sum(&loaded, &whole[..7]) + second);
    assert!((found.loss - nats / ids.len() as f64).abs() < 1e-5, "{found:?}");
}

#[test]
fn of_other_examples_the_loss_is_that_of_training() {
    let world = World::new(Kind::Float);
    let loaded = LoadedModel::open(&world.path("model"), None, Precision::F32, None, Device::Cpu).unwrap();
    let found = measured(&world, &[json!({"prompt": "where does ann live ?", "answer": "rome"})], None).unwrap();
    let encoding = Encoding { tokenizer: &loaded.tokenizer, chat: None, max_length: None, profile: Profile::Method };
    let encoded = encoding.example(&Example::pair("where does ann live ?", "rome")).unwrap();
    let scored = token_log_probs(&loaded.model, &[&encoded.input_ids]).unwrap().remove(0);
    let nats: f64 = -scored[encoded.learned[0].start - 1..].iter().map(|(value, _)| value).sum::<f64>();
    assert_eq!((found.tokens, &found.text), (encoded.targets(), &None));
    assert!((found.loss - nats / found.tokens as f64).abs() < 1e-5, "{found:?}");
}

#[test]
fn files_without_anything_to_predict_or_of_two_kinds_are_errors() {
    let world = World::new(Kind::Float);
    let mixed = [json!({"prompt": "", "answer": "a"}), json!({"prompt": "b", "answer": "a"})];
    assert!(matches!(measured(&world, &mixed, None), Err(LabError::MixedTexts { .. })));
    assert!(matches!(measured(&world, &[json!({"text": ""})], None), Err(LabError::NothingToPredict { .. })));
}
