//! Sizes of a model, computed from its `config.json`.

use cl_torch::Quantization;
use cl_train::{Precision, States, TrainConfig};
use serde_json::{Map, Value};

/// Shape of a Llama model, also used as an approximation for other families.
pub(crate) struct Shape {
    pub(crate) hidden: u64,
    pub(crate) intermediate: u64,
    pub(crate) layers: u64,
    /// Output width of the query projection, and of the key and value projections.
    pub(crate) heads: (u64, u64),
    pub(crate) vocabulary: u64,
    pub(crate) tied: bool,
    pub(crate) bytes_per_weight: u64,
}

impl Shape {
    pub(crate) fn of(config: &Map<String, Value>) -> Shape {
        let number = |key: &str| config.get(key).and_then(Value::as_u64);
        let hidden = number("hidden_size").unwrap_or(0);
        let heads = number("num_attention_heads").unwrap_or(1).max(1);
        let head_dim = number("head_dim").unwrap_or(hidden / heads);
        let stored = config.get("torch_dtype").or(config.get("dtype")).and_then(Value::as_str);
        Shape {
            hidden,
            intermediate: number("intermediate_size").unwrap_or(4 * hidden),
            layers: number("num_hidden_layers").unwrap_or(0),
            heads: (heads * head_dim, number("num_key_value_heads").unwrap_or(heads) * head_dim),
            vocabulary: number("vocab_size").unwrap_or(0),
            tied: config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            bytes_per_weight: if stored == Some("float32") { 4 } else { 2 },
        }
    }

    /// Returns input and output width of a layer's linear modules.
    pub(crate) fn linears(&self) -> [(u64, u64); 7] {
        let (h, f, (q, kv)) = (self.hidden, self.intermediate, self.heads);
        [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]
    }

    pub(crate) fn parameters(&self) -> u64 {
        self.layers * self.layer() + self.ends()
    }

    /// Number of parameters of a layer.
    pub(crate) fn layer(&self) -> u64 {
        self.linears().iter().map(|(i, o)| i * o).sum::<u64>() + 2 * self.hidden
    }

    /// Number of parameters outside of the layers: embedding, output head and final norm.
    pub(crate) fn ends(&self) -> u64 {
        let tables = if self.tied { 1 } else { 2 };
        tables * self.vocabulary * self.hidden + self.hidden
    }

    /// Number of parameters of an adapter of rank `rank` on every linear module.
    pub(crate) fn adapter(&self, rank: u64) -> u64 {
        self.layers * self.linears().iter().map(|(i, o)| rank * (i + o)).sum::<u64>()
    }

    /// Bytes of the frozen weights: linear modules of the blocks in the format `base`, other weights with `size` bytes
    /// each.
    pub(crate) fn frozen(&self, base: Option<Quantization>, size: u64) -> u64 {
        let Some(format) = base else { return self.parameters() * size };
        let quantized = self.linears().iter().map(|&(i, o)| format.bytes(o, i)).sum::<u64>();
        self.layers * (quantized + 2 * self.hidden * size) + self.ends() * size
    }

    /// Number of parameters of the largest linear module of a block, which is dequantized when it is computed.
    pub(crate) fn largest_linear(&self) -> u64 {
        self.linears().iter().map(|(i, o)| i * o).max().unwrap_or(0)
    }

    pub(crate) fn mlp(&self) -> u64 {
        self.layers * 3 * self.hidden * self.intermediate
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.parameters() * self.bytes_per_weight
    }

    /// Memory that the backward pass needs for the activations of `tokens` tokens: norms, projections and residuals of
    /// each layer, and the logits with their gradient in f32.
    pub(crate) fn activations(&self, tokens: u64, train: &TrainConfig) -> u64 {
        let size = if train.precision == Precision::Bf16 { 2 } else { 4 };
        let (q, kv) = self.heads;
        let layer = 6 * self.hidden + 2 * (q + 2 * kv) + 5 * self.intermediate;
        let layers =
            if train.activation_checkpointing { self.layers * self.hidden + layer } else { self.layers * layer };
        tokens * (layers * size + self.vocabulary * 12)
    }

    /// Memory of training with `tokens` tokens in a micro-batch.
    pub(crate) fn training(&self, tokens: u64, train: &TrainConfig) -> u64 {
        let size = if train.precision == Precision::Bf16 { 2 } else { 4 };
        let weights = match (&train.lora, train.states) {
            (Some(lora), _) => {
                let dense = if lora.base.is_some() { self.largest_linear() * size } else { 0 };
                self.frozen(lora.base, size) + dense + self.adapter(lora.r as u64) * 16
            }
            (None, _) if train.router.is_some() => self.parameters() * size,
            // Weights, gradients and two moments; for bf16 products, also a bf16 copy of the f32 weights.
            (None, States::Pure) => self.parameters() * size * 4,
            (None, States::F32) => self.parameters() * (16 + if size == 2 { 2 } else { 0 }),
        };
        weights + self.activations(tokens, train)
    }
}
