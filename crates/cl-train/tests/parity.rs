//! Ten optimizer steps against torch's AdamW and clip_grad_norm_: loss, gradient norm and learning rate of every step.
//! `fixtures/make_training.py` made the expected values.

#[path = "../../cl-model/tests/common/mod.rs"]
mod common;

use std::path::Path;

use cl_checkpoint::{Checkpoint, Dtype, Interrupt};
use cl_data::{Encoded, Encoding, Example, Profile, RowRef, Tokenizer};
use cl_model::Decoder;
use cl_torch::tch::{self, Device, Tensor};
use cl_train::{Plan, Ranks, TrainConfig, TrainContext, TrainData, read_log, train};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Fixture {
    examples: Vec<Ids>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Ids {
    source: Vec<u32>,
    target: Vec<u32>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    /// Number of examples that it trains on.
    rows: usize,
    train: TrainConfig,
    config: Map<String, Value>,
    tensors: Map<String, Value>,
    /// Loss, gradient norm before clipping, learning rate.
    log: Vec<[f64; 3]>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/training.json")).unwrap()
}

/// The model for a case's round; adapters get weights from the formula.
fn model(case: &Case, dir: &Path) -> Decoder {
    common::write_model(dir, &case.config, &case.tensors, Dtype::F32);
    let mut model = Decoder::load(&Checkpoint::open(dir).unwrap(), case.train.load_options(Device::Cpu)).unwrap();
    let Some(lora) = &case.train.lora else {
        model.set_requires_grad(true);
        return model;
    };
    model.add_lora(lora, 1).unwrap();
    let _no_graph = tch::no_grad_guard();
    for (name, mut t) in model.trainable() {
        let values = common::weight(&format!("base_model.model.{name}"), t.numel());
        t.copy_(&Tensor::from_slice(&values).view_as(&t));
    }
    model
}

/// The tokenized examples; in the case of truncation, truncated to the case's length, with BOS and EOS.
fn encoded(fixture: &Fixture, case: &Case, dir: &Path) -> Vec<Encoded> {
    if case.name != "lora_truncated" {
        let join = |e: &Ids| Encoded::new([e.source.clone(), e.target.clone()].concat(), e.source.len());
        return fixture.examples.iter().map(join).collect();
    }
    write_tokenizer(dir);
    let text = |ids: &[u32]| ids.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ");
    let examples: Vec<Example> =
        fixture.examples.iter().map(|e| Example::pair(text(&e.source), text(&e.target))).collect();
    let tokenizer = Tokenizer::from_dir(dir).unwrap();
    let (max_length, profile) = (case.train.max_length, Profile::Method);
    Encoding { tokenizer: &tokenizer, chat: None, max_length, profile }.examples(&examples).unwrap()
}

/// Writes a tokenizer with one token per word `wN`, whose id is N; BOS comes first.
fn write_tokenizer(dir: &Path) {
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let mut vocab: Map<String, Value> = (3..61).map(|id| (format!("w{id}"), json!(id))).collect();
    vocab.extend([("<unk>", 0), ("<s>", 1), ("</s>", 2)].map(|(word, id)| (word.to_owned(), json!(id))));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    });
    let config = json!({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn ten_steps_go_as_in_torch() {
    let fixture = fixture();
    let mut failures = Vec::new();
    for case in &fixture.cases {
        let dir = tempfile::tempdir().unwrap();
        let mut model = model(case, &dir.path().join("model"));
        let datasets = [encoded(&fixture, case, &dir.path().join("model"))];
        let rows = |epoch: u64| -> Vec<RowRef> {
            (0..case.rows).map(|i| RowRef { dataset: 0, row: (5 * i + epoch as usize) % case.rows }).collect()
        };
        let data = TrainData { datasets: &datasets, epoch_rows: &rows, orthogonality: None, validation: None };
        let plan = Plan::new(case.rows, &case.train, false).unwrap();
        let out = dir.path().join("round");
        let (interrupt, ranks) = (&Interrupt::default(), &Ranks::alone());
        let context = TrainContext { seed: 1, out: &out, interrupt, ranks, finish: false, at_checkpoint: None };
        train(&mut model, &data, &case.train, &plan, &context, None, &mut |_| {}).unwrap();
        let log = read_log(&out.join("log.jsonl")).unwrap();
        assert_eq!(log.len(), case.log.len(), "{}", case.name);
        let relative = |a: f64, b: f64| (a - b).abs() / b.abs();
        let mut largest = [0f64; 2];
        for (step, [loss, norm, lr]) in log.iter().zip(&case.log) {
            largest[0] = largest[0].max(relative(step.loss, *loss));
            largest[1] = largest[1].max(relative(step.grad_norm, *norm));
            assert!((step.learning_rate - lr).abs() <= 1e-8 * lr, "{} step {}", case.name, step.step);
        }
        eprintln!(
            "{}: largest relative difference of losses {:.1e}, of norms {:.1e}",
            case.name, largest[0], largest[1]
        );
        let bound = tolerance(&case.name);
        if largest[0] >= bound[0] || largest[1] >= bound[1] {
            failures.push(format!("{}: {largest:?} against {bound:?}", case.name));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Relative tolerances for losses and gradient norms.
fn tolerance(case: &str) -> [f64; 2] {
    if case.contains("bf16") {
        // bf16 has an 8-bit mantissa, so each product has a relative error of up to 2^-9. A loss is a mean over many of
        // them; a norm consists of squares of values that passed through all of them twice.
        return [4e-3, 3e-2];
    }
    // f32 sums in another order differ by 1e-7, and AdamW's division by √v amplifies this for small gradients.
    [1e-5, 1e-4]
}
