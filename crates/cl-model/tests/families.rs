//! Every family against Transformers: log-probabilities at each position and greedy continuations of tiny models.
//! `fixtures/make_families.py` made the expected values and states the formula of the weights.

use std::path::Path;

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions};
use cl_model::{Decoder, LoadOptions, greedy, token_log_probs};
use cl_torch::tch::Kind;
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

/// The formula of `make_families.py`.
fn weight(name: &str, n: usize) -> Vec<f32> {
    let key =
        name.bytes().fold(14_695_981_039_346_656_037_u64, |k, b| (k ^ u64::from(b)).wrapping_mul(1_099_511_628_211));
    (0..n as u64)
        .map(|i| {
            let mut z = key.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            let unit = (z >> 40) as f64 / (1u64 << 24) as f64 * 2.0 - 1.0;
            let value = if name.contains("norm") {
                1.0 + 0.25 * unit
            } else if name.ends_with("bias") {
                0.1 * unit
            } else {
                0.25 * unit
            };
            value as f32
        })
        .collect()
}

fn write_model(dir: &Path, case: &Case) {
    let specs: Vec<TensorSpec> = case
        .tensors
        .iter()
        .map(|(name, shape)| TensorSpec {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: serde_json::from_value(shape.clone()).unwrap(),
        })
        .collect();
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions::default()).unwrap();
    for spec in &specs {
        let bytes: Vec<u8> =
            weight(&spec.name, spec.shape.iter().product()).into_iter().flat_map(f32::to_le_bytes).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.put_json("config.json", &Value::Object(case.config.clone())).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
}

fn with_model(case: &Case, check: impl FnOnce(&Decoder)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write_model(&path, case);
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
            // f32 logits near 10 through four layers in another order of sums; 6 digits in the fixture.
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
