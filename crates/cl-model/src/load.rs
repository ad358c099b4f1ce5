use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Once;

use cl_adapters::{Embedding, Linear, WholePlan};
use cl_checkpoint::{Checkpoint, TensorSource};
use cl_moe::{ExpertStorage, low_rank_delta_tensors, sign_delta_tensors};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{Quantization, kind_of, load_tensor};

use crate::attention::{Attention, AttentionRule, Qkv};
use crate::config::{
    ExpertGating, ExpertLayout, ExpertModule, ModelConfig, NormPlacement, QkNorm, add_generation_config,
};
use crate::delta::{DeltaMlp, Deltas};
use crate::feed_forward::{Experts, FeedForward, GateUp, Mlp, Shared};
use crate::layer::{Layer, Norms};
use crate::norm::{NormForm, RmsNorm};
use crate::problem::ExpertsProblem;
use crate::projection::Projection;
use crate::quantized::{is_quantizable, stored};
use crate::rope::Rope;
use crate::routing::{Gate, Router, is_router_weight};
use crate::{Decoder, ModelError};

/// Dtypes, quantization and device of a loaded model.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Dtype of the weights in memory: f32 master weights for full fine-tuning, otherwise the same as `compute`.
    pub weights: Kind,
    /// Dtype of activations and matrix products.
    pub compute: Kind,
    /// Dtype of the adapters' matrix products. PEFT uses f32 without autocast, regardless of `compute`, and with
    /// autocast the same dtype as everything else.
    pub adapters: Kind,
    /// Quantization format of the weights of linear layers in memory (see [`is_quantizable`](crate::is_quantizable)),
    /// which then cannot be trained. If `None`, they are dense.
    pub quantization: Option<Quantization>,
    /// The device.
    pub device: Device,
}

impl LoadOptions {
    /// Options for weights and matrix products in one dtype, on the CPU.
    pub fn cpu(kind: Kind) -> LoadOptions {
        LoadOptions { weights: kind, compute: kind, adapters: kind, quantization: None, device: Device::Cpu }
    }
}

impl Decoder {
    /// Loads a Hugging Face model directory.
    ///
    /// # Errors
    /// Returns an error for an unknown architecture, an invalid config, and tensors that are missing, unused, or of
    /// another shape than the config implies.
    pub fn load(checkpoint: &Checkpoint, options: LoadOptions) -> Result<Decoder, ModelError> {
        Decoder::load_with(checkpoint, options, &|_, tensor| Ok(tensor))
    }

    /// Like [`Decoder::load`], but passes each tensor with its name to `place` as soon as it is read. The model uses
    /// the tensor that `place` returns, which must have the same shape and dtype.
    ///
    /// # Errors
    /// Returns the errors of [`Decoder::load`] and those of `place`.
    pub fn load_with(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        place: &dyn Fn(&str, Tensor) -> Result<Tensor, ModelError>,
    ) -> Result<Decoder, ModelError> {
        warn_of_emulation(options);
        from_checkpoint(checkpoint, options, &|name| {
            let kind = match name {
                _ if is_signs(name) => Kind::Uint8,
                _ if is_router_weight(name) || name.ends_with(".delta_scale") => Kind::Float,
                // Quantization formats are defined on the checkpoint's own values.
                _ if options.quantization.is_some() && is_quantizable(name) => Kind::Float,
                _ => options.weights,
            };
            let tensor = load_tensor(checkpoint, name, kind, options.device)?;
            if is_gateless_buffer(name) {
                check_equal_weights(checkpoint.dir(), name, &tensor)?;
            }
            place(name, tensor)
        })
    }

    /// Checks a model directory like [`Decoder::load`], but without reading tensors.
    ///
    /// # Errors
    /// Returns the errors of [`Decoder::load`].
    pub fn check(checkpoint: &Checkpoint) -> Result<ModelConfig, ModelError> {
        let options = LoadOptions::cpu(Kind::Float);
        let nothing = |_: &str| Ok(Tensor::zeros([0], (Kind::Float, Device::Cpu)));
        Ok(from_checkpoint(checkpoint, options, &nothing)?.config)
    }
}

/// Warns once that bf16 saves memory, but no time, on a processor without bf16 instructions.
fn warn_of_emulation(options: LoadOptions) {
    static ONCE: Once = Once::new();
    if options.compute == Kind::BFloat16 && options.device == Device::Cpu && cl_torch::emulates_bf16() {
        ONCE.call_once(|| {
            tracing::warn!(
                "this processor has no instructions for bf16: training and scoring are faster with precision = \"f32\", in more memory"
            );
        });
    }
}

/// Whether a tensor contains an expert's signs, one bit per weight.
fn is_signs(name: &str) -> bool {
    name.ends_with(".delta_sign")
}

/// Whether a tensor is stored in place of a router in a model without routers.
fn is_gateless_buffer(name: &str) -> bool {
    name.ends_with(".router")
}

/// Checks that the weights stored in place of a router are 1/experts, with which the model computes, up to rounding to
/// bf16 (8 bits).
fn check_equal_weights(dir: &Path, name: &str, weights: &Tensor) -> Result<(), ModelError> {
    let values: Vec<f64> = Vec::try_from(weights.to_kind(Kind::Double).to_device(Device::Cpu)).unwrap_or_default();
    let expected = 1.0 / values.len() as f64;
    let near = expected * (1.0 - 1.0 / 128.0)..=expected * (1.0 + 1.0 / 128.0);
    match values.iter().find(|value| !near.contains(value)) {
        None => Ok(()),
        Some(&value) => {
            let problem = ExpertsProblem::UnequalWeights { tensor: name.to_owned(), value, expected };
            Err(ModelError::Config { path: dir.to_owned(), problem: problem.into() })
        }
    }
}

/// Builds a decoder, reading every tensor that config.json implies with `read`; checks names, shapes and dtypes against
/// the files.
fn from_checkpoint(
    checkpoint: &Checkpoint,
    options: LoadOptions,
    read: &dyn Fn(&str) -> Result<Tensor, ModelError>,
) -> Result<Decoder, ModelError> {
    let dir = checkpoint.dir();
    let mut config = ModelConfig::from_json(dir, checkpoint.config())?;
    add_generation_config(&mut config, dir)?;
    if config.tie_word_embeddings && has_own_head(checkpoint)? {
        tracing::warn!(
            "{}: config.json ties the output head to the embedding, but lm_head.weight differs from it; \
             lm_head.weight is used, as in Transformers 5",
            dir.display()
        );
        config.tie_word_embeddings = false;
    }
    let missing = RefCell::new(Vec::new());
    let used = RefCell::new(BTreeSet::new());
    let get = |name: &str, shape: &[i64]| -> Result<Tensor, ModelError> {
        used.borrow_mut().insert(name.to_owned());
        let Some(info) = checkpoint.info(name) else {
            missing.borrow_mut().push(name.to_owned());
            return Ok(Tensor::zeros([0], (options.weights, options.device)));
        };
        let got: Vec<i64> = info.shape.iter().map(|&d| d as i64).collect();
        if got != shape {
            let (tensor, expected) = (name.to_owned(), shape.to_vec());
            return Err(ModelError::Shape { path: dir.to_owned(), tensor, expected, got });
        }
        let floats = [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16];
        let (allowed, expected) =
            if is_signs(name) { (&[Kind::Uint8][..], "U8") } else { (&floats[..], "F32, F16, BF16 or F64") };
        if !kind_of(info.dtype).is_some_and(|kind| allowed.contains(&kind)) {
            // Otherwise, quantized weights would be loaded as integers.
            let (tensor, dtype) = (name.to_owned(), format!("{:?}", info.dtype));
            return Err(ModelError::Dtype { path: dir.to_owned(), tensor, dtype, expected });
        }
        read(name)
    };
    let decoder = build(config, options, &get)?;
    let (missing, used) = (missing.into_inner(), used.into_inner());
    let left_over = |name: &&str| !used.contains(*name) && !decoder.config.is_redundant(name);
    let unused: Vec<&str> = checkpoint.names().into_iter().filter(left_over).collect();
    if missing.is_empty() && unused.is_empty() {
        return Ok(decoder);
    }
    let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
    Err(ModelError::Tensors { path: dir.to_owned(), missing: some(&missing), unused: some(&unused) })
}

/// Whether the files contain an output head that differs from the embedding.
fn has_own_head(checkpoint: &Checkpoint) -> Result<bool, ModelError> {
    let (head, table) = ("lm_head.weight", "model.embed_tokens.weight");
    let stored = checkpoint.info(head).is_some() && checkpoint.info(table).is_some();
    Ok(stored && !checkpoint.same_bytes(head, table)?)
}

/// Lists the first few names, and the number of the others.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

/// A function that returns the tensor of a name, which must have the given shape.
type Get<'a> = dyn Fn(&str, &[i64]) -> Result<Tensor, ModelError> + 'a;

/// Builds a decoder from the tensors that `get(name, shape)` returns.
pub(crate) fn build(config: ModelConfig, options: LoadOptions, get: &Get<'_>) -> Result<Decoder, ModelError> {
    let (hidden, inner, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q_width, kv_width) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let linear = |name: String, input: i64, output: i64, bias: bool| -> Result<Linear, ModelError> {
        let weight = format!("{name}.weight");
        let weight = stored(&weight, get(&weight, &[output, input])?, options.quantization)?;
        let bias = if bias { Some(get(&format!("{name}.bias"), &[output])?) } else { None };
        Ok(Linear { adapter_kind: Some(options.adapters), ..Linear::new(&name, weight, bias) })
    };
    let form = NormForm::of(&config);
    let norm = |name: String, width: i64| -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm { weight: get(&format!("{name}.weight"), &[width])?, name, eps: config.rms_norm_eps, form })
    };
    let qk_norm = |name: String, whole: i64| -> Result<Option<RmsNorm>, ModelError> {
        match config.qk_norm {
            QkNorm::None => Ok(None),
            QkNorm::Head => norm(name, d).map(Some),
            QkNorm::Whole => norm(name, whole).map(Some),
        }
    };
    let router = |name: String, input: i64| -> Result<Router, ModelError> {
        let experts = config.experts.as_ref().expect("asked for by the caller");
        let router = Router::new(linear(name, input, experts.routed(), false)?, experts.num_experts_per_tok);
        Ok(Router { norm_topk_prob: experts.norm_topk_prob, ..router })
    };
    let gate = |name: String, input: i64| -> Result<Gate, ModelError> {
        let experts = config.experts.as_ref().expect("asked for by the caller");
        match experts.gating {
            ExpertGating::Modules => Ok(Gate::Router(router(name, input)?)),
            ExpertGating::Global => Ok(Gate::Global),
            ExpertGating::Gateless => {
                let _ = get(&name, &[experts.routed()])?;
                Ok(Gate::Gateless { name, experts: experts.routed() })
            }
        }
    };
    // The experts' differences from the weight of a module.
    let deltas = |storage: ExpertStorage, experts: i64, name: &str, input: i64, output: i64| match storage {
        ExpertStorage::Full => unreachable!("asked for by callers of deltas alone"),
        ExpertStorage::LowRank(rank) => {
            let rank = i64::try_from(rank).unwrap_or(i64::MAX).min(input).min(output);
            let [u, v] = low_rank_delta_tensors(name);
            Ok(Deltas::LowRank { u: get(&u, &[experts, rank, output])?, v: get(&v, &[experts, rank, input])? })
        }
        ExpertStorage::BitDelta => {
            let [signs, scales] = sign_delta_tensors(name);
            let signs = get(&signs, &[experts, output, (input + 7) / 8])?;
            Ok::<_, ModelError>(Deltas::Signs { signs, scales: get(&scales, &[experts])?, columns: input })
        }
    };
    // One linear layer, or a router with experts if this module of the layer consists of experts.
    let projection = |layer: usize, module: ExpertModule, name: String, input: i64, output: i64, bias: bool| {
        let experts = config.experts.as_ref().filter(|experts| experts.has(layer, module));
        let Some(experts) = experts else { return Ok(Projection::Dense(linear(name, input, output, bias)?)) };
        if experts.storage.is_delta() {
            let deltas = deltas(experts.storage, experts.num_local_experts, &name, input, output)?;
            let gate = gate(format!("{name}.router"), input)?;
            return Ok(Projection::Deltas { gate, base: linear(name, input, output, bias)?, deltas });
        }
        let expert = |e: i64| linear(format!("{name}.experts.{e}"), input, output, bias);
        let shared = experts.shared.then(|| expert(0)).transpose()?;
        let experts = (i64::from(experts.shared)..experts.num_local_experts).map(expert).collect::<Result<_, _>>()?;
        Ok::<_, ModelError>(Projection::Experts { gate: gate(format!("{name}.router"), input)?, shared, experts })
    };
    // An MLP, with the family's names of gate, up and down; with `layer`, each of them may consist of experts.
    let mlp = |layer: Option<usize>, p: &str, inner: i64, [gate, up, down]: [&str; 3]| -> Result<Mlp, ModelError> {
        let bias = config.mlp_bias;
        let part = |name: &str, input, output| match layer {
            None => Ok(Projection::Dense(linear(format!("{p}.{name}"), input, output, bias)?)),
            Some(layer) => projection(layer, ExpertModule::MlpProjections, format!("{p}.{name}"), input, output, bias),
        };
        let gate_up = if config.fused_projections {
            GateUp::Fused(part("gate_up_proj", hidden, 2 * inner)?)
        } else {
            GateUp::Split(part(gate, hidden, inner)?, part(up, hidden, inner)?)
        };
        Ok(Mlp { gate_up, down: part(down, inner, hidden)?, activation: config.hidden_act })
    };
    let feed_forward = |layer: usize, p: &str| -> Result<FeedForward, ModelError> {
        let dense = ["gate_proj", "up_proj", "down_proj"];
        let Some(experts) = config.experts.as_ref().filter(|experts| experts.has(layer, ExpertModule::Mlp)) else {
            return Ok(FeedForward::Dense(mlp(Some(layer), &format!("{p}.mlp"), inner, dense)?));
        };
        if experts.storage.is_delta() {
            let part = |name: &str, input, output| {
                let name = format!("{p}.mlp.{name}");
                let deltas = deltas(experts.storage, experts.num_local_experts, &name, input, output)?;
                Ok::<_, ModelError>((linear(name, input, output, config.mlp_bias)?, deltas))
            };
            let routing = gate(format!("{p}.mlp.router"), hidden)?;
            let ((gate, of_gate), (up, of_up)) = (part(dense[0], hidden, inner)?, part(dense[1], hidden, inner)?);
            let (down, of_down) = part(dense[2], inner, hidden)?;
            let deltas = [of_gate, of_up, of_down];
            return Ok(FeedForward::Deltas(DeltaMlp {
                routing,
                gate,
                up,
                down,
                deltas,
                activation: config.hidden_act,
            }));
        }
        let (p, name, parts) = match experts.layout {
            ExpertLayout::Mixtral => (format!("{p}.block_sparse_moe"), "gate", ["w1", "w3", "w2"]),
            ExpertLayout::Qwen2Moe => (format!("{p}.mlp"), "gate", dense),
            ExpertLayout::Moetify => (format!("{p}.mlp"), "router", dense),
        };
        let gate = gate(format!("{p}.{name}"), hidden)?;
        let expert = |e: i64| mlp(None, &format!("{p}.experts.{e}"), experts.intermediate_size, parts);
        let (shared, first) = match (experts.shared, experts.layout) {
            (false, _) => (None, 0),
            (true, ExpertLayout::Qwen2Moe) => {
                let mlp = mlp(None, &format!("{p}.shared_expert"), experts.shared_intermediate_size, parts)?;
                let gate = linear(format!("{p}.shared_expert_gate"), hidden, 1, false)?;
                (Some(Shared { mlp, gate: Some(gate) }), 0)
            }
            (true, _) => (Some(Shared { mlp: expert(0)?, gate: None }), 1),
        };
        let experts = (first..first + experts.routed()).map(expert).collect::<Result<_, _>>()?;
        Ok(FeedForward::Experts(Experts { gate, shared, experts }))
    };
    let qkv = |layer: usize, p: &str| -> Result<Qkv, ModelError> {
        let bias = config.qkv_bias;
        if config.fused_projections {
            let qkv_proj = linear(format!("{p}.qkv_proj"), hidden, q_width + 2 * kv_width, bias)?;
            return Ok(Qkv::Fused { qkv_proj: Projection::Dense(qkv_proj), q_width });
        }
        let part = |module, name, width| projection(layer, module, format!("{p}.{name}"), hidden, width, bias);
        let q = part(ExpertModule::Query, "q_proj", q_width)?;
        let k = part(ExpertModule::Key, "k_proj", kv_width)?;
        Ok(Qkv::Split(q, k, part(ExpertModule::Value, "v_proj", kv_width)?))
    };
    let o_proj = |layer: usize, p: &str| {
        projection(layer, ExpertModule::Output, format!("{p}.o_proj"), q_width, hidden, config.o_bias)
    };
    let norms = |p: &str| -> Result<Norms, ModelError> {
        let named = |name: &str| norm(format!("{p}.{name}_layernorm"), hidden);
        Ok(match config.norms {
            NormPlacement::Pre => Norms::Pre { input: named("input")?, post_attention: named("post_attention")? },
            NormPlacement::PreAndPost => Norms::PreAndPost {
                input: named("input")?,
                post_attention: named("post_attention")?,
                pre_feedforward: named("pre_feedforward")?,
                post_feedforward: named("post_feedforward")?,
            },
            NormPlacement::Post => {
                Norms::Post { post_attention: named("post_attention")?, post_feedforward: named("post_feedforward")? }
            }
        })
    };
    let embed_tokens = "model.embed_tokens";
    let table = get(&format!("{embed_tokens}.weight"), &[config.vocab_size, hidden])?;
    let embed_tokens = Embedding { adapter_kind: Some(options.adapters), ..Embedding::new(embed_tokens, table) };
    let mut layers = Vec::with_capacity(config.num_hidden_layers);
    for i in 0..config.num_hidden_layers {
        let p = format!("model.layers.{i}");
        layers.push(Layer {
            norms: norms(&p)?,
            self_attn: Attention {
                qkv: qkv(i, &format!("{p}.self_attn"))?,
                o_proj: o_proj(i, &format!("{p}.self_attn"))?,
                q_norm: qk_norm(format!("{p}.self_attn.q_norm"), q_width)?,
                k_norm: qk_norm(format!("{p}.self_attn.k_norm"), kv_width)?,
                norm_heads: config.qk_norm == QkNorm::Head,
                head_dim: d,
                uses_rope: config.uses_rope[i],
                rule: AttentionRule {
                    window: config.windows[i],
                    scale: config.attention_multiplier,
                    softcap: config.attn_logit_softcapping,
                },
            },
            feed_forward: feed_forward(i, &p)?,
            residual_multiplier: config.residual_multiplier,
        });
    }
    let global = config.experts.as_ref().is_some_and(|experts| experts.gating == ExpertGating::Global);
    let global_router = global.then(|| router("model.router".to_owned(), hidden)).transpose()?;
    let norm = norm("model.norm".to_owned(), hidden)?;
    let lm_head = if config.tie_word_embeddings {
        None
    } else {
        Some(linear("lm_head".to_owned(), hidden, config.vocab_size, false)?)
    };
    let rope = Rope::new(&config, options.device);
    Ok(Decoder {
        config,
        compute: options.compute,
        device: options.device,
        activation_checkpointing: false,
        layer_hooks: None,
        embed_tokens,
        global_router,
        layers,
        norm,
        lm_head,
        rope,
        whole: WholePlan::default(),
        originals: Vec::new(),
    })
}
