//! Sampling and decoding: against Transformers, in batches of any composition, and with a KV cache.

mod common;

use std::collections::BTreeSet;

use cl_model::{
    Batching, Decoder, Decoding, GenerateOptions, Generation, LoadOptions, ModelError, Receiver, Sampling, Session,
    generate, generate_each, greedy,
};
use cl_torch::tch::Kind;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Fixture {
    config: Map<String, Value>,
    cases: Vec<Case>,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Case {
    settings: Settings,
    history: Vec<u32>,
    index: usize,
    scores: Vec<Option<f32>>,
}

#[derive(Deserialize)]
struct Settings {
    repetition_penalty: Option<f32>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f64>,
}

#[derive(Deserialize)]
struct Text {
    repetition_penalty: f32,
    prompt: Vec<u32>,
    ids: Vec<u32>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/decoding.json")).unwrap()
}

fn llama(changes: Value) -> Decoder {
    common::model(&common::llama(changes), LoadOptions::cpu(Kind::Float))
}

fn slices(sequences: &[Vec<u32>]) -> Vec<&[u32]> {
    sequences.iter().map(Vec::as_slice).collect()
}

fn sampling(seed: u64) -> Decoding {
    let sampling = Sampling { temperature: 0.9, top_k: Some(40), top_p: 0.95, seed };
    Decoding { repetition_penalty: 1.1, sampling: Some(sampling) }
}

/// The ids of all texts, none of which ends early.
fn ids(model: &Decoder, prompts: &[&[u32]], options: &GenerateOptions<'_>) -> Vec<Vec<u32>> {
    generate(model, prompts, options, &mut |_, _| false).unwrap().into_iter().map(|g| g.ids).collect()
}

#[test]
fn processed_logits_are_those_of_transformers() {
    let mut largest = 0f32;
    let fixture = fixture();
    assert_eq!(fixture.cases.len(), 45);
    for case in &fixture.cases {
        let Settings { repetition_penalty, temperature, top_k, top_p } = case.settings;
        let any = temperature.is_some() || top_k.is_some() || top_p.is_some();
        let sampling =
            Sampling { temperature: temperature.unwrap_or(1.0), top_k, top_p: top_p.unwrap_or(1.0), seed: 0 };
        let decoding =
            Decoding { repetition_penalty: repetition_penalty.unwrap_or(1.0), sampling: any.then_some(sampling) };
        let logits = common::weight(&format!("logits {}", case.index), case.scores.len());
        let mut scores: Vec<f32> = logits.into_iter().map(|l| l * 20.0).collect();
        decoding.process(&case.history, &mut scores);
        for (id, (ours, theirs)) in scores.iter().zip(&case.scores).enumerate() {
            let theirs = theirs.unwrap_or(f32::NEG_INFINITY);
            assert_eq!(ours.is_finite(), theirs.is_finite(), "{decoding:?}, token {id}: {ours} and {theirs}");
            if theirs.is_finite() {
                largest = largest.max((ours - theirs).abs() / theirs.abs().max(1.0));
            }
        }
    }
    eprintln!("largest relative difference {largest:.1e}");
    // The fixture has 8 digits, f32 has 7.
    assert!(largest < 2e-7, "{largest}");
}

#[test]
fn greedy_texts_with_a_penalty_are_those_of_transformers() {
    let fixture = fixture();
    let model = common::model(&fixture.config, LoadOptions::cpu(Kind::Float));
    for text in &fixture.texts {
        let decoding = Decoding { repetition_penalty: text.repetition_penalty, sampling: None };
        let options = GenerateOptions { max_new_tokens: text.ids.len(), decoding, ..GenerateOptions::default() };
        assert_eq!(ids(&model, &[&text.prompt], &options), [text.ids.as_slice()]);
    }
}

#[test]
fn a_text_is_drawn_the_same_whatever_else_is_in_the_batch() {
    let model = llama(json!({}));
    let prompts = common::sequences(&[5, 90, 2, 17, 5], 61, 11);
    let options = GenerateOptions { max_new_tokens: 25, decoding: sampling(3), ..GenerateOptions::default() };
    let together = ids(&model, &slices(&prompts), &options);
    assert_eq!(together, ids(&model, &slices(&prompts), &options));
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = GenerateOptions { first_prompt: index, ..options };
        assert_eq!(ids(&model, &[prompt], &alone), [together[index].as_slice()], "prompt {index}");
    }
    let halves = [&prompts[..2], &prompts[2..]];
    let from = |half: usize| GenerateOptions { first_prompt: 2 * half, ..options };
    let in_two: Vec<_> = (0..2).flat_map(|h| ids(&model, &slices(halves[h]), &from(h))).collect();
    assert_eq!(in_two, together);
    // Another seed gives other texts; the same prompt twice in a batch gets two texts.
    let other = GenerateOptions { decoding: sampling(4), ..options };
    assert_ne!(ids(&model, &slices(&prompts), &other), together);
    let twice = ids(&model, &[&prompts[0], &prompts[0]], &options);
    assert_ne!(twice[0], twice[1]);
    assert_eq!(twice[0], together[0]);
}

/// Counts the texts that are generated at the same time.
struct Watcher {
    generations: Vec<Option<Generation>>,
    open: BTreeSet<usize>,
    most: usize,
}

impl Receiver for Watcher {
    type Error = ModelError;

    fn stop(&mut self, index: usize, ids: &[u32]) -> bool {
        self.open.insert(index);
        self.most = self.most.max(self.open.len());
        ids.len() > 3 * index % 11
    }

    fn done(&mut self, index: usize, generation: Generation) -> Result<(), ModelError> {
        self.open.remove(&index);
        assert!(self.generations[index].replace(generation).is_none(), "{index} twice");
        if index == 99 { Err(ModelError::NotANumber) } else { Ok(()) }
    }
}

#[test]
fn texts_do_not_depend_on_how_many_are_generated_at_the_same_time() {
    // Prompts with a long common prefix, with a short one, and with none.
    let beginning = &common::sequences(&[80], 61, 5)[0];
    let lengths: Vec<usize> = (0..30).map(|i| 1 + 7 * i % 40).collect();
    let mut prompts = common::sequences(&lengths, 61, 6);
    for (index, prompt) in prompts.iter_mut().enumerate() {
        let shared = [80, 20, 0][index % 3];
        prompt.splice(0..0, beginning[..shared].iter().copied());
    }
    let windows = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 9});
    for (model, decoding) in [
        (llama(json!({})), Decoding::default()),
        (llama(json!({})), sampling(3)),
        (llama(windows), Decoding::default()),
    ] {
        let run = |sequences, tokens| {
            let batching = Batching { sequences, tokens };
            let options = GenerateOptions { max_new_tokens: 9, decoding, batching, ..GenerateOptions::default() };
            let mut watcher = Watcher { generations: vec![None; 30], open: BTreeSet::new(), most: 0 };
            generate_each(&model, &slices(&prompts), &options, &mut watcher).unwrap();
            assert!(watcher.open.is_empty());
            (watcher.generations, watcher.most)
        };
        let (expected, all) = run(usize::MAX, usize::MAX);
        assert!(expected.iter().all(Option::is_some));
        assert!(all > 20, "{all}");
        for (sequences, tokens) in [(1, 1), (1, 1000), (4, 200), (9, 1000), (16, 60), (1000, 150)] {
            let (texts, most) = run(sequences, tokens);
            assert!(most <= sequences, "{most} of {sequences}");
            assert_eq!(texts, expected, "{sequences} sequences, {tokens} tokens");
        }
    }
}

#[test]
fn an_error_of_the_receiver_ends_generation() {
    let prompts = common::sequences(&[5; 100], 61, 8);
    let options = GenerateOptions {
        max_new_tokens: 2,
        batching: Batching { sequences: 4, tokens: 1000 },
        ..GenerateOptions::default()
    };
    let mut watcher = Watcher { generations: vec![None; 100], open: BTreeSet::new(), most: 0 };
    assert!(generate_each(&llama(json!({})), &slices(&prompts), &options, &mut watcher).is_err());
}

#[test]
fn sampling_that_leaves_one_token_is_greedy() {
    let model = llama(json!({}));
    let prompts = common::sequences(&[5, 9], 61, 12);
    let plain: Vec<_> =
        greedy(&model, &slices(&prompts), 20, &[], &mut |_, _| false).unwrap().into_iter().map(|g| g.ids).collect();
    for sampling in [
        Sampling { top_k: Some(1), ..Sampling::default() },
        Sampling { top_p: 1e-6, ..Sampling::default() },
        Sampling { temperature: 1e-6, ..Sampling::default() },
    ] {
        let decoding = Decoding { sampling: Some(sampling), ..Decoding::default() };
        let options = GenerateOptions { max_new_tokens: 20, decoding, ..GenerateOptions::default() };
        assert_eq!(ids(&model, &slices(&prompts), &options), plain, "{sampling:?}");
    }
}

#[test]
fn a_session_continues_each_prompt_as_if_it_were_the_first() {
    let window = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 5});
    for model in [llama(json!({})), llama(window)] {
        let mut session = Session::new(&model);
        let ids = &common::sequences(&[160], 61, 13)[0];
        let other = &common::sequences(&[30], 61, 14)[0];
        // Prompts that are longer, longer than the cache's initial capacity, the same again, shorter, diverging
        // halfway, unrelated, and new.
        let forked = [&ids[..50], other].concat();
        let prompts = [&ids[..10], &ids[..100], &ids[..100], &ids[..60], &forked, other, &ids[..160]];
        for (turn, prompt) in prompts.iter().enumerate() {
            let decoding = if turn % 2 == 0 { sampling(5) } else { Decoding::default() };
            let options = GenerateOptions { max_new_tokens: 12, decoding, first_prompt: turn, ..Default::default() };
            let mut seen = Vec::new();
            let text = session
                .generate(prompt, &options, &mut |ids| {
                    seen = ids.to_vec();
                    turn == 3 && ids.len() == 4
                })
                .unwrap();
            let alone = generate(&model, &[prompt], &options, &mut |_, _| false).unwrap();
            let end = if turn == 3 { 4 } else { 12 };
            assert_eq!(text.ids, alone[0].ids[..end], "turn {turn}");
            assert_eq!((text.stopped, seen), (turn == 3, text.ids));
        }
        let options = GenerateOptions { max_new_tokens: 2, ..GenerateOptions::default() };
        let empty = session.generate(&[], &options, &mut |_| false).unwrap_err().to_string();
        assert!(empty.contains("empty"), "{empty}");
        assert!(session.generate(&[1, 2, 99], &options, &mut |_| false).is_err());
        session.generate(&ids[..20], &options, &mut |_| false).unwrap();
    }
}

#[test]
fn settings_are_checked_before_anything_is_computed() {
    let model = llama(json!({}));
    let decoding = Decoding { repetition_penalty: 0.0, ..Decoding::default() };
    let options = GenerateOptions { max_new_tokens: 2, decoding, ..GenerateOptions::default() };
    let message = generate(&model, &[&[1]], &options, &mut |_, _| false).unwrap_err().to_string();
    assert_eq!(message, "repetition_penalty is 0; expected a number above 0; 1 changes nothing");
}

/// The repetitive texts of random models are guessed several tokens at a time; the tokens are those that the model
/// chooses one by one.
#[test]
fn guessed_tokens_change_no_text() {
    cl_torch::tch::set_num_threads(1); // products this small are faster on one thread
    let header: Vec<u32> = (0..70).map(|i| i * 7 % 31 + 1).collect();
    let tail = |seed: u32, len: u32| (0..len).map(|i| (i % 9 * seed + 3) % 31 + 1).collect::<Vec<u32>>();
    let mut prompts: Vec<Vec<u32>> = (1..6).map(|seed| [header.clone(), tail(seed, 5 + 4 * seed)].concat()).collect();
    prompts.extend((1..4).map(|seed| tail(seed, 3 * seed)));
    for changes in [
        json!({}),
        json!({"num_key_value_heads": 1}),
        json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 11}),
    ] {
        let model = llama(changes.clone());
        let one_by_one = |prompt: &[u32]| {
            let mut text = prompt.to_vec();
            for _ in 0..60 {
                text.push(greedy(&model, &[&text], 1, &[], &mut |_, _| false).unwrap()[0].ids[0]);
            }
            text.split_off(prompt.len())
        };
        let alone: Vec<Vec<u32>> = prompts.iter().map(|p| one_by_one(p)).collect();
        let mut calls = 0;
        let together = greedy(&model, &slices(&prompts), 60, &[], &mut |_, _| {
            calls += 1;
            false
        });
        let together: Vec<Vec<u32>> = together.unwrap().into_iter().map(|g| g.ids).collect();
        assert_eq!(together, alone, "{changes}");
        assert_eq!(calls, 60 * prompts.len(), "every token is handed over");
        // An end token inside a guess ends the text there.
        let end = alone[0][40];
        let place = alone[0].iter().position(|&id| id == end).unwrap();
        let ended = greedy(&model, &[&prompts[0]], 60, &[end], &mut |_, _| false).unwrap().remove(0);
        assert!(ended.stopped && ended.ids == alone[0][..place]);
        let stopped = greedy(&model, &[&prompts[0]], 60, &[], &mut |_, ids| ids.len() == 43).unwrap().remove(0);
        assert!(stopped.stopped && stopped.ids == alone[0][..43]);
    }
}
