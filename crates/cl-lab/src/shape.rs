//! Sizes of a model, computed from its `config.json`.

use std::path::Path;

use cl_model::ModelConfig;
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
    experts: Option<ExpertShape>,
}

/// Experts in place of the MLPs of some layers.
struct ExpertShape {
    /// Number of layers that have them.
    layers: u64,
    /// Number of experts that a router selects from, and how many it selects.
    routed: u64,
    per_token: u64,
    /// Inner width of an expert, and of the shared expert (0 if there is none).
    width: u64,
    shared: u64,
}

impl ExpertShape {
    fn of(config: &Map<String, Value>) -> Option<ExpertShape> {
        let experts = ModelConfig::from_json(Path::new("model"), config).ok()?.experts?;
        let number = |n: i64| n.unsigned_abs();
        Some(ExpertShape {
            layers: experts.layers.iter().filter(|has| **has).count() as u64,
            routed: number(experts.routed()),
            per_token: number(experts.num_experts_per_tok),
            width: number(experts.intermediate_size),
            shared: if experts.shared { number(experts.shared_intermediate_size) } else { 0 },
        })
    }
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
            experts: ExpertShape::of(config),
        }
    }

    /// Returns number, input and output width of all linear modules of the blocks, without routers.
    fn linears(&self) -> Vec<(u64, u64, u64)> {
        let (h, (q, kv)) = (self.hidden, self.heads);
        let mlps = |count: u64, width: u64| [(2 * count, h, width), (count, width, h)];
        let dense = self.layers - self.experts.as_ref().map_or(0, |e| e.layers);
        let mut all = vec![(self.layers, h, q), (2 * self.layers, h, kv), (self.layers, q, h)];
        all.extend(mlps(dense, self.intermediate));
        if let Some(experts) = &self.experts {
            all.extend(mlps(experts.layers * experts.routed, experts.width));
            all.extend(mlps(experts.layers, experts.shared));
        }
        all
    }

    pub(crate) fn parameters(&self) -> u64 {
        let linears: u64 = self.linears().iter().map(|(n, i, o)| n * i * o).sum();
        linears + self.routers() + 2 * self.layers * self.hidden + self.ends()
    }

    /// Number of parameters that a token uses: of the experts, those that are selected for it.
    pub(crate) fn parameters_per_token(&self) -> u64 {
        let unused = |e: &ExpertShape| e.layers * e.routed.saturating_sub(e.per_token) * 3 * self.hidden * e.width;
        self.parameters() - self.experts.as_ref().map_or(0, unused)
    }

    /// Number of parameters of routers, including the gate of a shared expert.
    fn routers(&self) -> u64 {
        let of = |e: &ExpertShape| e.layers * self.hidden * (e.routed + u64::from(e.shared > 0));
        self.experts.as_ref().map_or(0, of)
    }

    /// Number of parameters of the largest layer.
    pub(crate) fn layer(&self) -> u64 {
        let (h, (q, kv)) = (self.hidden, self.heads);
        let dense = 3 * h * self.intermediate;
        let experts = |e: &ExpertShape| 3 * h * (e.routed * e.width + e.shared) + self.routers() / e.layers.max(1);
        let mlp = match &self.experts {
            Some(e) if e.layers == self.layers => experts(e),
            Some(e) => experts(e).max(dense),
            None => dense,
        };
        2 * h * (q + kv) + mlp + 2 * h
    }

    /// Number of parameters outside of the layers: embedding, output head and final norm.
    pub(crate) fn ends(&self) -> u64 {
        let tables = if self.tied { 1 } else { 2 };
        tables * self.vocabulary * self.hidden + self.hidden
    }

    /// Number of parameters of an adapter of rank `rank` on every linear module.
    pub(crate) fn adapter(&self, rank: u64) -> u64 {
        self.linears().iter().map(|(n, i, o)| n * rank * (i + o)).sum()
    }

    /// Bytes of the frozen weights: linear modules of the blocks in the format `base`, other weights with `size` bytes
    /// each.
    pub(crate) fn frozen(&self, base: Option<Quantization>, size: u64) -> u64 {
        let Some(format) = base else { return self.parameters() * size };
        let quantized = self.linears().iter().map(|&(n, i, o)| n * format.bytes(o, i)).sum::<u64>();
        quantized + (self.routers() + 2 * self.layers * self.hidden + self.ends()) * size
    }

    /// Number of parameters of the largest linear module of a block, which is dequantized when it is computed.
    pub(crate) fn largest_linear(&self) -> u64 {
        self.linears().iter().filter(|(n, ..)| *n > 0).map(|(_, i, o)| i * o).max().unwrap_or(0)
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
        let width = |e: &ExpertShape| e.per_token * e.width + e.shared;
        let widest = self.experts.as_ref().map_or(self.intermediate, width).max(self.dense_width());
        let layer = 6 * self.hidden + 2 * (q + 2 * kv) + 5 * widest;
        let layers =
            if train.activation_checkpointing { self.layers * self.hidden + layer } else { self.layers * layer };
        tokens * (layers * size + self.vocabulary * 12)
    }

    /// Inner width of the dense MLPs; 0 if all layers have experts.
    fn dense_width(&self) -> u64 {
        let all = self.experts.as_ref().is_some_and(|e| e.layers == self.layers);
        if all { 0 } else { self.intermediate }
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

#[cfg(test)]
mod tests {
    use cl_model::{LoadOptions, random_weights};
    use cl_torch::tch::Kind;
    use serde_json::json;

    use super::*;

    #[test]
    fn parameters_of_mixtures_are_those_of_the_models() {
        let common = json!({
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": false,
        });
        for own in [
            json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 48}),
            json!({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": 48,
                "num_local_experts": 5, "num_experts_per_tok": 2}),
        ] {
            let mut config = common.as_object().unwrap().clone();
            config.extend(own.as_object().unwrap().clone());
            let model = random_weights(&config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
            let counted: usize = model.named_parameters().iter().map(|(_, t)| t.numel()).sum();
            let shape = Shape::of(&config);
            assert_eq!(shape.parameters(), counted as u64, "{own}");
            let per_token = if own["model_type"] == "mixtral" { counted - 2 * 3 * 3 * 32 * 48 } else { counted };
            assert_eq!(shape.parameters_per_token(), per_token as u64);
        }
    }
}
