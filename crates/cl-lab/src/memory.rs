//! Estimates the memory of training on several GPUs, before anything runs.

use cl_torch::Quantization;
use cl_train::{Precision, States, TrainConfig};
use serde_json::{Map, Value};

use crate::shape::Shape;

/// Several GPUs of the same model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// Number of GPUs.
    pub count: u64,
    /// Name of the GPU model, if known.
    pub name: Option<String>,
    /// Memory of each, in bytes.
    pub memory: u64,
}

impl Gpus {
    /// Throughput of all GPUs together in FLOP/s, at 40 % of the nominal dense bf16 throughput in NVIDIA's data sheets;
    /// `None` if the GPU model is unknown.
    pub(crate) fn flops(&self) -> Option<f64> {
        let known = [("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12), ("A10", 125e12)];
        let name = self.name.as_deref()?;
        let of_one = known.into_iter().find(|(kind, _)| name.starts_with(kind)).map(|(_, flops)| flops)?;
        Some(0.4 * of_one * self.count as f64)
    }
}

/// Memory of one process at one ZeRO stage, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageMemory {
    /// `zero_stage`.
    pub stage: u8,
    /// Weights, including those gathered at one time.
    pub weights: u64,
    /// Gradients, including those of the largest layer while they are sent.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// Activations of a full-length micro-batch, and its logits.
    pub activations: u64,
}

impl StageMemory {
    /// Total memory.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations
    }
}

/// Memory that training needs on each of several GPUs.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// Number of parameters of the model, and of trained parameters (of the model or of its adapters).
    pub parameters: (u64, u64),
    /// Memory of one process, for each ZeRO stage.
    pub stages: [StageMemory; 4],
    /// Tokens per second on all GPUs together at 40 % of their nominal throughput, if that is known.
    pub tokens_per_second: Option<f64>,
}

impl MemoryPlan {
    /// Estimates training with the settings `train` a model with this `config.json`. Micro-batches are assumed to be
    /// full: `micro_batch_size` rows of `max_length` tokens (1,024 if it is not set). Sizes are those of a Llama model,
    /// with experts if it is a mixture of MLPs, and with adapters on every linear layer; the CUDA context is not
    /// included.
    pub fn new(model: &Map<String, Value>, train: &TrainConfig, gpus: &Gpus) -> MemoryPlan {
        let shape = Shape::of(model);
        let (all, adapter) = (shape.parameters(), train.lora.as_ref().map(|lora| shape.adapter(lora.r.unsigned_abs())));
        let trained = adapter.unwrap_or(all);
        let tokens = train.micro_batch_size as u64 * train.max_length.unwrap_or(1024) as u64;
        let compute = if train.precision == Precision::Bf16 { 2 } else { 4 };
        let full = adapter.is_none();
        let kept = if full && train.states == States::F32 { 4 } else { compute };
        // Adapters are always f32.
        let state = if full { kept } else { 4 };
        let base = train.lora.as_ref().and_then(|lora| lora.base);
        let sizes = Sizes { shape: &shape, trained, full, base, kept, state, compute, ranks: gpus.count };
        let stages = [0, 1, 2, 3].map(|stage| sizes.of(stage, tokens, train));
        let operations = if full { 6 } else { 4 } + if train.activation_checkpointing { 2 } else { 0 };
        let rate = |flops: f64| flops / (operations * shape.parameters_per_token()) as f64;
        MemoryPlan { parameters: (all, trained), stages, tokens_per_second: gpus.flops().map(rate) }
    }

    /// Returns the lowest ZeRO stage that fits into `memory` bytes.
    pub fn fits(&self, memory: u64) -> Option<u8> {
        self.stages.iter().find(|stage| stage.total() <= memory).map(|stage| stage.stage)
    }
}

/// Sizes from which the memory of a stage is computed.
struct Sizes<'a> {
    shape: &'a Shape,
    trained: u64,
    full: bool,
    /// Format of the frozen weights, if they are quantized. These are never sharded, so stage 3 equals stage 2.
    base: Option<Quantization>,
    /// Bytes per unquantized weight of the model.
    kept: u64,
    /// Bytes per trained parameter.
    state: u64,
    compute: u64,
    ranks: u64,
}

impl Sizes<'_> {
    fn of(&self, stage: u8, tokens: u64, train: &TrainConfig) -> StageMemory {
        let (shape, ranks) = (self.shape, self.ranks);
        let (all, layer, ends) = (shape.parameters(), shape.layer(), shape.ends());
        let divided = ranks > 1;
        let spreads = divided && stage == 3 && self.base.is_none();
        // bf16 copies of f32 weights are kept until the backward pass has used them; with recomputation, those of one
        // layer.
        let recomputes = train.activation_checkpointing || spreads;
        let copied =
            if self.kept == self.compute { 0 } else { self.compute * if recomputes { layer + ends } else { all } };
        let adapter = if self.full { 0 } else { self.trained * self.state };
        let own = self.trained * self.state / ranks;
        let frozen = shape.frozen(self.base, self.kept);
        let dequantized = if self.base.is_some() { shape.largest_linear() * self.compute } else { 0 };
        let weights = copied
            + adapter
            + dequantized
            + match stage {
                _ if !divided => frozen,
                0 => frozen,
                // In addition to the full tensors, the shard that the optimizer updates.
                _ if !spreads => frozen + own,
                _ => all * self.kept / ranks + (layer + ends) * self.kept + if self.full { 0 } else { own },
            };
        let whole = self.trained * self.state;
        // Gradients of the largest unit count twice: as they are computed, and as they are sent.
        let unit = if self.full { ends.max(layer) * self.state } else { whole / shape.layers.max(1) };
        let gradients = match stage {
            0 if divided => whole + whole.min(64 << 20),
            _ if !divided || stage == 0 => whole,
            1 => whole + own + unit,
            _ => own + 2 * unit,
        };
        let optimizer = 2 * whole / if divided && stage > 0 { ranks } else { 1 };
        let mut recomputed = train.clone();
        recomputed.activation_checkpointing = recomputes;
        StageMemory { stage, weights, gradients, optimizer, activations: shape.activations(tokens, &recomputed) }
    }
}

#[cfg(test)]
mod tests {
    use cl_train::{Full, TrainConfig};
    use serde_json::json;

    use super::*;

    fn a100(count: u64) -> Gpus {
        Gpus { count, name: Some("A100".to_owned()), memory: 80_000_000_000 }
    }

    fn llama_8b() -> Map<String, Value> {
        let config = json!({
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": false
        });
        config.as_object().unwrap().clone()
    }

    #[test]
    fn full_fine_tuning_of_llama_3_8b_is_the_arithmetic_of_its_parameters() {
        // 8,030,261,248 parameters; pure bf16 takes 8 bytes for each, 64 GB without activations.
        let train = TrainConfig {
            full: Some(Full {}),
            precision: Precision::Bf16,
            states: States::Pure,
            micro_batch_size: 4,
            ..TrainConfig::default()
        };
        let alone = MemoryPlan::new(&llama_8b(), &train, &a100(1));
        assert_eq!(alone.parameters, (8_030_261_248, 8_030_261_248));
        let stage = alone.stages[0];
        assert_eq!(stage.weights + stage.gradients + stage.optimizer, 8 * 8_030_261_248);
        // With f32 master weights, training does not fit on one GPU, but on eight with stage 3.
        let masters = TrainConfig { states: States::F32, activation_checkpointing: true, ..train };
        let eight = MemoryPlan::new(&llama_8b(), &masters, &a100(8));
        assert_eq!(eight.stages[0].optimizer, 8 * 8_030_261_248);
        assert_eq!(eight.stages[3].optimizer, 8_030_261_248);
        assert_eq!(eight.fits(80_000_000_000), Some(2));
        assert_eq!(MemoryPlan::new(&llama_8b(), &masters, &a100(1)).fits(80_000_000_000), None);
    }

    #[test]
    fn a_quantized_base_counts_its_bytes() {
        use cl_adapters::LoraConfig;
        // 32 layers with 218,103,808 weights in seven linear modules; the other 1,050,939,392 parameters are in bf16.
        let (linears, rest) = (32 * 218_103_808u64, 1_050_939_392u64);
        let plan = |base, count| {
            let lora = Some(LoraConfig { base, ..LoraConfig::default() });
            let train = TrainConfig { lora, precision: Precision::Bf16, ..TrainConfig::default() };
            MemoryPlan::new(&llama_8b(), &train, &a100(count)).stages
        };
        // In addition to the base: 20,971,520 adapter parameters in f32, and the largest module, 4,096 x 14,336, in
        // bf16.
        let (adapter, dense) = (4 * 20_971_520, 2 * 58_720_256);
        assert_eq!(plan(None, 1)[0].weights, 2 * (linears + rest) + adapter);
        // NF4: half a byte per weight, one byte per 64 weights, four bytes per 16,384 weights, and four bytes for the
        // mean of each of 224 modules.
        let nf4 = linears / 2 + linears / 64 + 4 * (linears / 16_384 + 224);
        assert_eq!(plan(Some(Quantization::Nf4), 1)[0].weights, nf4 + 2 * rest + adapter + dense);
        // int8: one byte per weight, and four bytes for each of the 43,008 rows of a layer's modules.
        let int8 = linears + 32 * 4 * 43_008;
        assert_eq!(plan(Some(Quantization::Int8), 1)[0].weights, int8 + 2 * rest + adapter + dense);
        // Stage 3 would not shard any weights.
        let stages = plan(Some(Quantization::Nf4), 2);
        assert_eq!(StageMemory { stage: 2, ..stages[3] }, stages[2]);
    }

    #[test]
    fn the_plan_is_near_what_processes_of_a_small_model_were_measured_to_hold() {
        // docs/benchmarks.md, "Memory of several processes", in MiB; about 130 MiB of it is the process without a
        // model.
        let model = json!({
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": 49152, "tie_word_embeddings": true
        });
        let train =
            TrainConfig { full: Some(Full {}), micro_batch_size: 1, max_length: Some(64), ..TrainConfig::default() };
        let measured = [(1, 0, 5664.0), (2, 2, 4408.0), (2, 3, 3304.0), (4, 2, 3100.0), (4, 3, 2030.0)];
        for (ranks, stage, measured) in measured {
            let gpus = Gpus { count: ranks, name: None, memory: 1 << 40 };
            let plan = MemoryPlan::new(model.as_object().unwrap(), &train, &gpus);
            let planned = plan.stages[stage].total() as f64 / f64::from(1 << 20) + 130.0;
            assert!(
                (planned / measured - 1.0).abs() < 0.1,
                "{ranks} ranks, stage {stage}: {planned} against {measured}"
            );
        }
    }
}
