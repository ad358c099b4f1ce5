//! Writes a random Llama model, and synthetic fine-tuned models of it, for benchmarks.
//!
//! `cargo run --release -p cl-merge --example make_models -- DIR 135m|1b COUNT` writes `DIR/base` and `DIR/ft0` …, in bf16.
//! Weights are random; the fine-tuned models differ by noise of about 0.002, rounded to bf16 like a saved model.

use std::path::Path;

use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions, convert};
use cl_merge::Stream;
use serde_json::json;

/// Dimensions of a Llama model.
struct Size {
    vocab: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, size, count] = &arguments[..] else { return Err("expected DIR, 135m or 1b, and COUNT".into()) };
    let size = match size.as_str() {
        // The shapes of SmolLM2-135M, and of TinyLlama with Llama 3.2's narrow heads.
        "135m" => Size { vocab: 49_152, hidden: 576, intermediate: 1536, layers: 30, heads: 9, kv_heads: 3 },
        "1b" => Size { vocab: 32_000, hidden: 2048, intermediate: 5632, layers: 22, heads: 32, kv_heads: 4 },
        other => return Err(format!("unknown size `{other}`; 135m or 1b").into()),
    };
    for model in 0..=count.parse::<u64>()? {
        let name = if model == 0 { "base".to_owned() } else { format!("ft{}", model - 1) };
        write(&Path::new(dir).join(name), &size, model)?;
    }
    Ok(())
}

fn write(dir: &Path, size: &Size, model: u64) -> Result<(), cl_checkpoint::Error> {
    if dir.join("manifest.json").exists() {
        return Ok(());
    }
    let specs = specs(size);
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions { overwrite: true, ..WriteOptions::default() })?;
    for spec in &specs {
        let n = spec.shape.iter().product();
        let offset = if spec.shape.len() == 1 { 1.0 } else { 0.0 };
        let values = noise(0, &spec.name, n, 0.05).into_iter();
        let values: Vec<f32> = match model {
            0 => values.map(|b| offset + b).collect(),
            _ => {
                // Differences are relative to the base as stored in bf16.
                let base = convert::from_f32(Dtype::BF16, &values.map(|b| offset + b).collect::<Vec<f32>>());
                let base = convert::to_f32(Dtype::BF16, &base.expect("bf16 is a float")).expect("bf16 is a float");
                base.into_iter().zip(noise(model, &spec.name, n, 0.002)).map(|(b, d)| b + d).collect()
            }
        };
        writer.write(&spec.name, &convert::from_f32(Dtype::BF16, &values).expect("bf16 is a float"))?;
    }
    writer.put_json(
        "config.json",
        &json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": true,
            "torch_dtype": "bfloat16",
        }),
    )?;
    writer.finish(Manifest::new("model"))
}

fn specs(size: &Size) -> Vec<TensorSpec> {
    let (h, kv) = (size.hidden, size.hidden / size.heads * size.kv_heads);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![size.vocab, h])];
    for layer in 0..size.layers {
        for (name, shape) in [
            ("input_layernorm", vec![h]),
            ("self_attn.q_proj", vec![h, h]),
            ("self_attn.k_proj", vec![kv, h]),
            ("self_attn.v_proj", vec![kv, h]),
            ("self_attn.o_proj", vec![h, h]),
            ("post_attention_layernorm", vec![h]),
            ("mlp.gate_proj", vec![size.intermediate, h]),
            ("mlp.up_proj", vec![size.intermediate, h]),
            ("mlp.down_proj", vec![h, size.intermediate]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![h]));
    tensors.into_iter().map(|(name, shape)| TensorSpec { name, dtype: Dtype::BF16, shape }).collect()
}

/// Returns bell-shaped noise with about this standard deviation: the sum of four uniform numbers.
fn noise(model: u64, tensor: &str, elements: usize, size: f32) -> Vec<f32> {
    let mut random = vec![0; 4 * elements];
    Stream::new(model, tensor, "bench").fill(0, &mut random);
    let uniform = |r: &u16| f32::from(*r) / 65_535.0 - 0.5;
    // Each of the four has a variance of 1/12.
    random.chunks_exact(4).map(|four| four.iter().map(uniform).sum::<f32>() * size * 3f32.sqrt()).collect()
}
