use std::cell::RefCell;
use std::collections::BTreeSet;

use cl_adapters::{Embedding, Linear, WholePlan};
use cl_checkpoint::{Checkpoint, TensorSource};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{kind_of, load_tensor};

use crate::attention::{Attention, AttentionRule, Qkv};
use crate::config::{ModelConfig, NormPlacement, QkNorm, add_generation_eos};
use crate::feed_forward::{Experts, FeedForward, GateUp, Mlp, is_router_weight};
use crate::layer::{Layer, Norms};
use crate::norm::{NormForm, RmsNorm};
use crate::rope::Rope;
use crate::{Decoder, ModelError};

/// In which precision and where a model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Dtype of the weights in memory; f32 master weights for full fine-tuning, else the same as `compute`.
    pub weights: Kind,
    /// Dtype of activations and products.
    pub compute: Kind,
    /// Dtype of the adapters' products. PEFT computes them in f32 outside of autocast, whatever `compute` is; within it as
    /// everything else.
    pub adapters: Kind,
    /// Where.
    pub device: Device,
}

impl LoadOptions {
    /// Weights and products in one dtype on the CPU.
    pub fn cpu(kind: Kind) -> LoadOptions {
        LoadOptions { weights: kind, compute: kind, adapters: kind, device: Device::Cpu }
    }
}

impl Decoder {
    /// Loads a Hugging Face model directory.
    ///
    /// # Errors
    /// An unknown architecture, a config that does not make sense, tensors that are missing, left over or of another
    /// shape than the config implies.
    pub fn load(checkpoint: &Checkpoint, options: LoadOptions) -> Result<Decoder, ModelError> {
        from_checkpoint(checkpoint, options, &|name| {
            let kind = if is_router_weight(name) { Kind::Float } else { options.weights };
            Ok(load_tensor(checkpoint, name, kind, options.device)?)
        })
    }

    /// Checks a model directory as [`Decoder::load`] does, without reading a tensor.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn check(checkpoint: &Checkpoint) -> Result<ModelConfig, ModelError> {
        let options = LoadOptions::cpu(Kind::Float);
        let nothing = |_: &str| Ok(Tensor::zeros([0], (Kind::Float, Device::Cpu)));
        Ok(from_checkpoint(checkpoint, options, &nothing)?.config)
    }
}

/// Asks `read` for every tensor that config.json implies, and holds names, shapes and dtypes against the files.
fn from_checkpoint(
    checkpoint: &Checkpoint,
    options: LoadOptions,
    read: &dyn Fn(&str) -> Result<Tensor, ModelError>,
) -> Result<Decoder, ModelError> {
    let dir = checkpoint.dir();
    let mut config = ModelConfig::from_json(dir, checkpoint.config())?;
    add_generation_eos(&mut config, dir)?;
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
        if !kind_of(info.dtype).is_some_and(|k| matches!(k, Kind::Double | Kind::Float | Kind::Half | Kind::BFloat16)) {
            // Quantized weights would load as whole numbers.
            let (tensor, dtype) = (name.to_owned(), format!("{:?}", info.dtype));
            return Err(ModelError::Dtype { path: dir.to_owned(), tensor, dtype });
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

/// The first few names, and how many more there are.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

/// Gives the tensor of a name, which has to have a shape.
type Get<'a> = dyn Fn(&str, &[i64]) -> Result<Tensor, ModelError> + 'a;

/// Puts a decoder together from `get(name, shape)`.
pub(crate) fn build(config: ModelConfig, options: LoadOptions, get: &Get<'_>) -> Result<Decoder, ModelError> {
    let (hidden, inner, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q_width, kv_width) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let linear = |name: String, input: i64, output: i64, bias: bool| -> Result<Linear, ModelError> {
        let weight = get(&format!("{name}.weight"), &[output, input])?;
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
    // Gate, up and down by the names that they have in the family.
    let mlp = |p: &str, [gate, up, down]: [&str; 3]| -> Result<Mlp, ModelError> {
        let bias = config.mlp_bias;
        let gate_up = if config.fused_projections {
            GateUp::Fused(linear(format!("{p}.gate_up_proj"), hidden, 2 * inner, bias)?)
        } else {
            let gate = linear(format!("{p}.{gate}"), hidden, inner, bias)?;
            GateUp::Split(gate, linear(format!("{p}.{up}"), hidden, inner, bias)?)
        };
        Ok(Mlp { gate_up, down: linear(format!("{p}.{down}"), inner, hidden, bias)?, activation: config.hidden_act })
    };
    let feed_forward = |p: &str| -> Result<FeedForward, ModelError> {
        let Some(experts) = config.experts else {
            return Ok(FeedForward::Dense(mlp(&format!("{p}.mlp"), ["gate_proj", "up_proj", "down_proj"])?));
        };
        let p = format!("{p}.block_sparse_moe");
        let mut gate = linear(format!("{p}.gate"), hidden, experts.num_local_experts, false)?;
        (gate.weight, gate.adapter_kind) = (gate.weight.to_kind(Kind::Float), None);
        let expert = |e: i64| mlp(&format!("{p}.experts.{e}"), ["w1", "w3", "w2"]);
        Ok(FeedForward::Experts(Experts {
            gate,
            experts: (0..experts.num_local_experts).map(expert).collect::<Result<_, _>>()?,
            num_experts_per_tok: experts.num_experts_per_tok,
            recorder: None,
        }))
    };
    let qkv = |p: &str| -> Result<Qkv, ModelError> {
        let bias = config.qkv_bias;
        if config.fused_projections {
            let qkv_proj = linear(format!("{p}.qkv_proj"), hidden, q_width + 2 * kv_width, bias)?;
            return Ok(Qkv::Fused { qkv_proj, q_width });
        }
        let q = linear(format!("{p}.q_proj"), hidden, q_width, bias)?;
        let k = linear(format!("{p}.k_proj"), hidden, kv_width, bias)?;
        Ok(Qkv::Split(q, k, linear(format!("{p}.v_proj"), hidden, kv_width, bias)?))
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
                qkv: qkv(&format!("{p}.self_attn"))?,
                o_proj: linear(format!("{p}.self_attn.o_proj"), q_width, hidden, config.o_bias)?,
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
            feed_forward: feed_forward(&p)?,
            residual_multiplier: config.residual_multiplier,
        });
    }
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
        embed_tokens,
        layers,
        norm,
        lm_head,
        rope,
        whole: WholePlan::default(),
        originals: Vec::new(),
    })
}
