//! Tiny random Llamas, made in the test.

use std::path::{Path, PathBuf};

use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions, convert};
use cl_merge::Stream;
use serde_json::json;

/// Layout of a model.
#[derive(Clone)]
pub struct Llama {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub dtype: Dtype,
    pub tied: bool,
    pub max_shard_size: u64,
}

impl Default for Llama {
    fn default() -> Self {
        Llama { vocab: 40, hidden: 16, layers: 2, dtype: Dtype::BF16, tied: true, max_shard_size: u64::MAX }
    }
}

impl Llama {
    fn tensors(&self) -> Vec<TensorSpec> {
        let (h, i) = (self.hidden, 2 * self.hidden);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, h])];
        for layer in 0..self.layers {
            let mut add =
                |name: &str, shape: Vec<usize>| tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            add("input_layernorm", vec![h]);
            add("self_attn.q_proj", vec![h, h]);
            add("self_attn.k_proj", vec![h / 2, h]);
            add("self_attn.v_proj", vec![h / 2, h]);
            add("self_attn.o_proj", vec![h, h]);
            add("post_attention_layernorm", vec![h]);
            add("mlp.gate_proj", vec![i, h]);
            add("mlp.up_proj", vec![i, h]);
            add("mlp.down_proj", vec![h, i]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![h]));
        if !self.tied {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab, h]));
        }
        tensors.into_iter().map(|(name, shape)| TensorSpec { name, dtype: self.dtype, shape }).collect()
    }

    /// Writes a model. `seed` 0 is the base; others are the base plus differences of their own. `change` may alter a value by
    /// tensor and flat index.
    pub fn write_with(&self, dir: &Path, seed: u64, change: impl Fn(&str, usize, f32) -> f32) {
        let tensors = self.tensors();
        let options = WriteOptions { max_shard_size: self.max_shard_size, overwrite: true };
        let writer = CheckpointWriter::create(dir, &tensors, options).unwrap();
        for spec in &tensors {
            let elements: usize = spec.shape.iter().product();
            let base = noise(0, &spec.name, elements, 0.1);
            let delta = if seed == 0 { vec![0.0; elements] } else { noise(seed, &spec.name, elements, 0.01) };
            let offset = if spec.shape.len() == 1 { 1.0 } else { 0.0 };
            let values: Vec<f32> =
                base.iter().zip(&delta).enumerate().map(|(i, (b, d))| change(&spec.name, i, offset + b + d)).collect();
            writer.write(&spec.name, &convert::from_f32(self.dtype, &values).unwrap()).unwrap();
        }
        writer.put_json("config.json", &self.config()).unwrap();
        writer.finish(Manifest::new("model")).unwrap();
    }

    /// Writes a model as it is.
    pub fn write(&self, dir: &Path, seed: u64) {
        self.write_with(dir, seed, |_, _, value| value);
    }

    fn config(&self) -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        })
    }

    /// A base and `count` fine-tuned models in a folder: `base`, `ft1`, `ft2`, …
    pub fn family(&self, folder: &Path, count: u64) -> (PathBuf, Vec<PathBuf>) {
        let base = folder.join("base");
        self.write(&base, 0);
        let models = (1..=count)
            .map(|seed| {
                let dir = folder.join(format!("ft{seed}"));
                self.write(&dir, seed);
                dir
            })
            .collect();
        (base, models)
    }
}

/// Triangular noise of about this size, the same for the same seed and name.
fn noise(seed: u64, name: &str, elements: usize, size: f32) -> Vec<f32> {
    let mut words = vec![0u16; 2 * elements];
    Stream::new(seed, name, "test model").fill(0, &mut words);
    let unit = |word: u16| f32::from(word) / f32::from(u16::MAX);
    words.chunks_exact(2).map(|pair| (unit(pair[0]) - unit(pair[1])) * 2.0 * size).collect()
}
