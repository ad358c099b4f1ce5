//! Tiny models whose weights come from a formula of tensor name and index, so that fixtures contain no weights.
//! `fixtures/formula.py` computes the same numbers.

#![allow(dead_code)] // each test binary uses only some of these functions

use std::path::Path;

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions};
use cl_model::{Decoder, LoadOptions};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::tensor_bytes;
use serde_json::{Map, Value, json};

/// The formula: values around 0, around 1 for norms, smaller for biases; equal weights in place of a router.
pub fn weight(name: &str, n: usize) -> Vec<f32> {
    let key =
        name.bytes().fold(14_695_981_039_346_656_037_u64, |k, b| (k ^ u64::from(b)).wrapping_mul(1_099_511_628_211));
    (0..n as u64)
        .map(|i| {
            let mut z = key.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            let unit = (z >> 40) as f64 / (1u64 << 24) as f64 * 2.0 - 1.0;
            let value = if name.ends_with(".router") {
                1.0 / n as f64
            } else if name.contains("norm") {
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

/// A tensor from the formula, rounded to `dtype`, with its bytes as stored in a file.
pub fn stored(name: &str, shape: &[usize], dtype: Dtype) -> (TensorSpec, Vec<u8>) {
    let kind = cl_torch::kind_of(dtype).unwrap();
    let values = Tensor::from_slice(&weight(name, shape.iter().product()));
    (TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }, tensor_bytes(&values, kind))
}

/// Writes a model directory with tensors from the formula; `tensors` maps names to shapes.
pub fn write_model(dir: &Path, config: &Map<String, Value>, tensors: &Map<String, Value>, dtype: Dtype) {
    // Products this small are faster on one thread, and tests run in parallel.
    cl_torch::tch::set_num_threads(1);
    let tensors: Vec<(TensorSpec, Vec<u8>)> = tensors
        .iter()
        .map(|(name, shape)| {
            let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
            stored(name, &shape, dtype)
        })
        .collect();
    let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.0.clone()).collect();
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions { overwrite: true, ..Default::default() }).unwrap();
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.put_json("config.json", &Value::Object(config.clone())).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
}

/// `config.json` of a Llama with two layers, modified by `changes`.
pub fn llama(changes: Value) -> Map<String, Value> {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.as_object().unwrap().clone()
}

/// Names and shapes of the tensors that `config` implies.
pub fn tensors(config: &Map<String, Value>) -> Map<String, Value> {
    let model = cl_model::random_weights(config, 0, LoadOptions::cpu(Kind::Float)).unwrap();
    model.named_parameters().into_iter().map(|(name, t)| (name, json!(t.size()))).collect()
}

/// Loads a model with weights from the formula.
pub fn model(config: &Map<String, Value>, options: LoadOptions) -> Decoder {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write_model(&path, config, &tensors(config), Dtype::F32);
    Decoder::load(&Checkpoint::open(&path).unwrap(), options).unwrap()
}

/// Token sequences of the given lengths, from a generator keyed by `seed`.
pub fn sequences(lengths: &[usize], vocab: u32, seed: u64) -> Vec<Vec<u32>> {
    lengths
        .iter()
        .enumerate()
        .map(|(i, &n)| {
            let unit = weight(&format!("sequence {seed} {i}"), n);
            unit.into_iter().map(|u| ((f64::from(u) * 2.0 + 0.5) * f64::from(vocab)) as u32 % vocab).collect()
        })
        .collect()
}

/// Largest absolute difference of two tensors of the same shape.
pub fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_device(Device::Cpu).to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}
