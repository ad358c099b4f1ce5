//! Every family against Transformers: log-probabilities at each position and greedy continuations of tiny models.
//! `fixtures/make_families.py` made the expected values.

mod common;

use cl_checkpoint::{Checkpoint, Dtype};
use cl_model::{Decoder, LoadOptions, greedy, token_log_probs};
use cl_torch::tch::Kind;
use common::write_model;
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Fixture {
    sequences: Vec<Vec<u32>>,
    prompts: Vec<Vec<u32>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Map<String, Value>,
    tensors: Map<String, Value>,
    log_probs: Vec<Vec<f64>>,
    greedy: Vec<Vec<u32>>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/families.json")).unwrap()
}

fn with_model(case: &Case, check: impl FnOnce(&Decoder)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write_model(&path, &case.config, &case.tensors, Dtype::F32);
    let model = Decoder::load(&Checkpoint::open(&path).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap();
    check(&model);
}

#[test]
fn log_probabilities_agree_at_every_position() {
    let fixture = fixture();
    let sequences: Vec<&[u32]> = fixture.sequences.iter().map(Vec::as_slice).collect();
    for case in &fixture.cases {
        with_model(case, |model| {
            let ours = token_log_probs(model, &sequences).unwrap();
            let mut largest = 0f64;
            for (a, b) in ours.iter().zip(&case.log_probs) {
                assert_eq!(a.len(), b.len(), "{}", case.name);
                for (x, y) in a.iter().zip(b) {
                    largest = largest.max((x.0 - y).abs());
                }
            }
            eprintln!("{}: largest difference {largest:.2e}", case.name);
            // f32 logits near 10 through four layers, with sums in another order; 6 digits in the fixture.
            assert!(largest < 2e-5, "{}: {largest}", case.name);
        });
    }
}

#[test]
fn greedy_continuations_are_the_same_alone_and_together() {
    let fixture = fixture();
    let prompts: Vec<&[u32]> = fixture.prompts.iter().map(Vec::as_slice).collect();
    for case in &fixture.cases {
        with_model(case, |model| {
            let together = greedy(model, &prompts, 10, &[], &mut |_, _| false).unwrap();
            for (i, prompt) in prompts.iter().enumerate() {
                assert_eq!(together[i].ids, case.greedy[i], "{} prompt {i}", case.name);
                let alone = greedy(model, &[prompt], 10, &[], &mut |_, _| false).unwrap();
                assert_eq!(alone[0].ids, case.greedy[i], "{} prompt {i} alone", case.name);
            }
        });
    }
}
