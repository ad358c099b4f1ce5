use serde_json::{Map, Value, json};

use super::keys::{Keys, missing};
use super::tokenizer::SpecialIds;
use super::{Error, FloatDtype, GgufFile, KeyProblem, rope};

/// The supported architectures, as named in `general.architecture`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    const ALL: [(&'static str, Architecture); 3] =
        [("llama", Architecture::Llama), ("qwen2", Architecture::Qwen2), ("qwen3", Architecture::Qwen3)];

    pub(super) fn name(self) -> &'static str {
        Self::ALL.iter().find(|row| row.1 == self).expect("every architecture has a row").0
    }
}

/// The model's shape according to its metadata; tensors are checked against it.
pub(super) struct Shape {
    pub(super) architecture: Architecture,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab: usize,
    pub(super) context: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: Option<Value>,
    sliding_window: Option<usize>,
}

/// Which optional tensors exist.
pub(super) struct Optional {
    pub(super) lm_head: bool,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
}

impl Shape {
    pub(super) fn read(file: &GgufFile) -> Result<Shape, Error> {
        let architecture = architecture(file)?;
        let keys = Keys { file, prefix: architecture.name() };
        keys.refuse_unknown()?;
        keys.refuse_other_than("expert_count", 0)?;
        let (layers, hidden) = (keys.positive("block_count")?, keys.positive("embedding_length")?);
        let heads = keys.positive("attention.head_count")?;
        let kv_heads = keys.positive_or("attention.head_count_kv", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.error("attention.head_count_kv", KeyProblem::Heads { heads, kv_heads }));
        }
        let head_dim = head_dim(&keys, architecture, hidden, heads)?;
        let rope_theta = file.float(&keys.full("rope.freq_base"))?.unwrap_or(10_000.0);
        let rms_norm_eps = keys.required(
            "attention.layer_norm_rms_epsilon",
            file.float(&keys.full("attention.layer_norm_rms_epsilon"))?,
        )?;
        if rope_theta <= 0.0 || rms_norm_eps <= 0.0 {
            let key = if rope_theta <= 0.0 { "rope.freq_base" } else { "attention.layer_norm_rms_epsilon" };
            return Err(keys.error(key, KeyProblem::NotPositive));
        }
        let context = keys.positive("context_length")?;
        Ok(Shape {
            architecture,
            layers,
            hidden,
            intermediate: keys.positive("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            vocab: vocab_size(&keys)?,
            context,
            rms_norm_eps,
            rope_theta,
            rope_scaling: rope::scaling(file, architecture.name(), head_dim, rope_theta)?,
            sliding_window: sliding_window(&keys, architecture, context)?,
        })
    }

    /// Returns `model_type` and class name as in Transformers. A llama with a sliding window is called Mistral there.
    pub(super) fn model_type(&self) -> (&'static str, &'static str) {
        match (self.architecture, self.sliding_window) {
            (Architecture::Llama, None) => ("llama", "LlamaForCausalLM"),
            (Architecture::Llama, Some(_)) => ("mistral", "MistralForCausalLM"),
            (Architecture::Qwen2, _) => ("qwen2", "Qwen2ForCausalLM"),
            (Architecture::Qwen3, _) => ("qwen3", "Qwen3ForCausalLM"),
        }
    }

    /// Returns `config.json`. Transformers reads `torch_dtype` before 4.56, and `dtype` since then.
    pub(super) fn to_json(&self, optional: &Optional, ids: &SpecialIds, dtype: FloatDtype) -> Value {
        let (model_type, class) = self.model_type();
        let mut config = json!({
            "architectures": [class],
            "model_type": model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "vocab_size": self.vocab,
            "tie_word_embeddings": !optional.lm_head,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": true,
            "torch_dtype": dtype.torch_name(),
            "dtype": dtype.torch_name(),
        });
        let map = config.as_object_mut().expect("an object was written");
        match model_type {
            "llama" => insert(
                map,
                [("attention_bias", optional.attention_bias.into()), ("mlp_bias", optional.mlp_bias.into())],
            ),
            "mistral" => insert(map, [("sliding_window", json!(self.sliding_window))]),
            "qwen3" => {
                insert(map, [("attention_bias", optional.attention_bias.into()), ("use_sliding_window", false.into())])
            }
            _ => insert(map, [("use_sliding_window", false.into())]),
        }
        insert(map, ids.named().map(|(name, id)| (name, json!(id))));
        config
    }
}

fn insert<const N: usize>(map: &mut Map<String, Value>, entries: [(&str, Value); N]) {
    map.extend(entries.map(|(key, value)| (key.to_owned(), value)));
}

fn architecture(file: &GgufFile) -> Result<Architecture, Error> {
    if let Some(parts) = file.uint("split.count")?.filter(|&n| n > 1) {
        return Err(file.key_error("split.count", KeyProblem::Split { parts }));
    }
    let key = "general.architecture";
    let name = file.string(key)?.ok_or_else(|| missing(file, key.to_owned()))?;
    Architecture::ALL.iter().find(|row| row.0 == name).map(|row| row.1).ok_or_else(|| Error::Architecture {
        path: file.path().to_owned(),
        architecture: name.to_owned(),
        supported: Architecture::ALL.map(|row| row.0).to_vec(),
    })
}

/// Returns the width of a head: the stated one, or by llama's old convention the rotary width, or an equal share of the
/// hidden size.
fn head_dim(keys: &Keys, architecture: Architecture, hidden: usize, heads: usize) -> Result<usize, Error> {
    let rotary = keys.optional("rope.dimension_count")?;
    let stated = keys.optional("attention.key_length")?;
    let share = hidden / heads;
    let head_dim = match (stated, architecture, rotary) {
        (Some(stated), _, _) => stated,
        (None, Architecture::Llama, Some(rotary)) => rotary,
        _ => share,
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim.checked_mul(heads).is_none() {
        return Err(keys.error("attention.head_count", KeyProblem::HeadSize { head_dim }));
    }
    if let Some(rotary) = rotary.filter(|&r| r != head_dim) {
        return Err(keys.error("rope.dimension_count", KeyProblem::PartialRotary { rotary, head_dim }));
    }
    if let Some(value_length) = keys.optional("attention.value_length")?.filter(|&v| v != head_dim) {
        let problem = KeyProblem::ValueLength { value_length, key_length: head_dim };
        return Err(keys.error("attention.value_length", problem));
    }
    Ok(head_dim)
}

/// Returns the number of rows of the embedding, which the metadata must not contradict.
fn vocab_size(keys: &Keys) -> Result<usize, Error> {
    let tensor = "token_embd.weight";
    let embedding = keys.file.tensors().get(tensor);
    let embedding = embedding
        .ok_or_else(|| Error::MissingTensor { path: keys.file.path().to_owned(), tensor: tensor.to_owned() })?;
    let rows = embedding.shape[0];
    match keys.optional("vocab_size")? {
        Some(stated) if stated != rows => Err(keys.error("vocab_size", KeyProblem::VocabSize { stated, tensor, rows })),
        _ => Ok(rows),
    }
}

fn sliding_window(keys: &Keys, architecture: Architecture, context: usize) -> Result<Option<usize>, Error> {
    let key = "attention.sliding_window";
    match keys.optional(key)?.filter(|&window| window > 0 && window < context) {
        Some(window) if architecture != Architecture::Llama => {
            Err(keys.error(key, KeyProblem::SlidingWindow { window, architecture: architecture.name() }))
        }
        window => Ok(window),
    }
}
