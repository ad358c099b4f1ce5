//! Builds a decoder from a config and a source of tensors: the modules of each family under their names in Hugging Face
//! checkpoints.

use cl_adapters::{Embedding, Linear, WholePlan};
use cl_moe::{ExpertStorage, low_rank_delta_tensors, sign_delta_tensors};
use cl_torch::tch::Tensor;

use crate::attention::{Attention, AttentionRule, Qkv};
use crate::config::{self, ExpertGating, ExpertLayout, ExpertModule, ModelConfig, NormPlacement, QkNorm};
use crate::delta::{DeltaMlp, Deltas};
use crate::feed_forward::{Experts, FeedForward, GateUp, Mlp, Shared};
use crate::layer::{Layer, Norms};
use crate::load::LoadOptions;
use crate::norm::{NormForm, RmsNorm};
use crate::projection::Projection;
use crate::quantized::stored;
use crate::rope::Rope;
use crate::routing::{Gate, Router};
use crate::{Decoder, ModelError};

/// A function that returns the tensor of a name, which must have the given shape.
type Get<'a> = dyn Fn(&str, &[i64]) -> Result<Tensor, ModelError> + 'a;

/// Names of the gate, up and down projections of a dense MLP.
const DENSE: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Builds a decoder from the tensors that `get(name, shape)` returns.
pub(crate) fn build(config: ModelConfig, options: LoadOptions, get: &Get<'_>) -> Result<Decoder, ModelError> {
    let builder = Builder { config: &config, options, get };
    let embed_tokens = builder.embedding("model.embed_tokens")?;
    let layers = (0..config.num_hidden_layers).map(|i| builder.layer(i)).collect::<Result<Vec<_>, _>>()?;
    let global = config.experts.as_ref().filter(|experts| experts.gating == ExpertGating::Global);
    let global_router =
        global.map(|experts| builder.router(experts, "model.router".to_owned(), config.hidden_size)).transpose()?;
    let norm = builder.norm("model.norm".to_owned(), config.hidden_size)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(builder.linear("lm_head".to_owned(), config.hidden_size, config.vocab_size, false)?),
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

/// Builds modules. In all methods, `name` and `prefix` are names in the checkpoint, and widths are in features.
struct Builder<'a> {
    config: &'a ModelConfig,
    options: LoadOptions,
    get: &'a Get<'a>,
}

impl Builder<'_> {
    fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let prefix = format!("model.layers.{index}");
        Ok(Layer {
            norms: self.norms(&prefix)?,
            self_attn: self.attention(index, &format!("{prefix}.self_attn"))?,
            feed_forward: self.feed_forward(index, &prefix)?,
            residual_multiplier: self.config.residual_multiplier,
        })
    }

    fn embedding(&self, name: &str) -> Result<Embedding, ModelError> {
        let table = (self.get)(&format!("{name}.weight"), &[self.config.vocab_size, self.config.hidden_size])?;
        Ok(Embedding { adapter_kind: Some(self.options.adapters), ..Embedding::new(name, table) })
    }

    fn linear(&self, name: String, input: i64, output: i64, bias: bool) -> Result<Linear, ModelError> {
        let weight = format!("{name}.weight");
        let weight = stored(&weight, (self.get)(&weight, &[output, input])?, self.options.quantization)?;
        let bias = if bias { Some((self.get)(&format!("{name}.bias"), &[output])?) } else { None };
        Ok(Linear { adapter_kind: Some(self.options.adapters), ..Linear::new(&name, weight, bias) })
    }

    fn norm(&self, name: String, width: i64) -> Result<RmsNorm, ModelError> {
        let weight = (self.get)(&format!("{name}.weight"), &[width])?;
        Ok(RmsNorm { weight, name, eps: self.config.rms_norm_eps, form: NormForm::of(self.config) })
    }

    fn norms(&self, prefix: &str) -> Result<Norms, ModelError> {
        let named = |name: &str| self.norm(format!("{prefix}.{name}_layernorm"), self.config.hidden_size);
        Ok(match self.config.norms {
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
    }

    fn attention(&self, layer: usize, prefix: &str) -> Result<Attention, ModelError> {
        let config = self.config;
        let (hidden, [q_width, kv_width]) = (config.hidden_size, self.attention_widths());
        Ok(Attention {
            qkv: self.qkv(layer, prefix)?,
            o_proj: self.projection(
                (layer, ExpertModule::Output),
                format!("{prefix}.o_proj"),
                q_width,
                hidden,
                config.o_bias,
            )?,
            q_norm: self.qk_norm(format!("{prefix}.q_norm"), q_width)?,
            k_norm: self.qk_norm(format!("{prefix}.k_norm"), kv_width)?,
            norm_heads: config.qk_norm == QkNorm::Head,
            head_dim: config.head_dim,
            uses_rope: config.uses_rope[layer],
            rule: AttentionRule {
                window: config.windows[layer],
                scale: config.attention_multiplier,
                softcap: config.attn_logit_softcapping,
            },
        })
    }

    /// Widths of the queries, and of the keys and the values.
    fn attention_widths(&self) -> [i64; 2] {
        [self.config.num_attention_heads, self.config.num_key_value_heads].map(|heads| heads * self.config.head_dim)
    }

    fn qkv(&self, layer: usize, prefix: &str) -> Result<Qkv, ModelError> {
        let (hidden, bias) = (self.config.hidden_size, self.config.qkv_bias);
        let [q_width, kv_width] = self.attention_widths();
        if self.config.fused_projections {
            let qkv_proj = self.linear(format!("{prefix}.qkv_proj"), hidden, q_width + 2 * kv_width, bias)?;
            return Ok(Qkv::Fused { qkv_proj: Projection::Dense(qkv_proj), q_width });
        }
        let part =
            |module, name, width| self.projection((layer, module), format!("{prefix}.{name}"), hidden, width, bias);
        let q = part(ExpertModule::Query, "q_proj", q_width)?;
        let k = part(ExpertModule::Key, "k_proj", kv_width)?;
        Ok(Qkv::Split(q, k, part(ExpertModule::Value, "v_proj", kv_width)?))
    }

    fn qk_norm(&self, name: String, whole: i64) -> Result<Option<RmsNorm>, ModelError> {
        match self.config.qk_norm {
            QkNorm::None => Ok(None),
            QkNorm::Head => self.norm(name, self.config.head_dim).map(Some),
            QkNorm::Whole => self.norm(name, whole).map(Some),
        }
    }

    fn feed_forward(&self, layer: usize, prefix: &str) -> Result<FeedForward, ModelError> {
        let experts = self.config.experts.as_ref().filter(|experts| experts.has(layer, ExpertModule::Mlp));
        match experts {
            None => {
                let inner = self.config.intermediate_size;
                Ok(FeedForward::Dense(self.mlp(Some(layer), &format!("{prefix}.mlp"), inner, DENSE)?))
            }
            Some(experts) if experts.storage.is_delta() => {
                Ok(FeedForward::Deltas(self.delta_mlp(experts, &format!("{prefix}.mlp"))?))
            }
            Some(experts) => Ok(FeedForward::Experts(self.experts(experts, prefix)?)),
        }
    }

    /// An MLP with the family's names of gate, up and down. With `layer`, each of them may consist of experts.
    fn mlp(
        &self,
        layer: Option<usize>,
        prefix: &str,
        inner: i64,
        [gate, up, down]: [&str; 3],
    ) -> Result<Mlp, ModelError> {
        let (hidden, bias) = (self.config.hidden_size, self.config.mlp_bias);
        let part = |name: &str, input, output| match layer {
            None => Ok(Projection::Dense(self.linear(format!("{prefix}.{name}"), input, output, bias)?)),
            Some(layer) => {
                self.projection((layer, ExpertModule::MlpProjections), format!("{prefix}.{name}"), input, output, bias)
            }
        };
        let gate_up = if self.config.fused_projections {
            GateUp::Fused(part("gate_up_proj", hidden, 2 * inner)?)
        } else {
            GateUp::Split(part(gate, hidden, inner)?, part(up, hidden, inner)?)
        };
        Ok(Mlp { gate_up, down: part(down, inner, hidden)?, activation: self.config.hidden_act })
    }

    /// The experts of a layer's MLP, each stored in full.
    fn experts(&self, experts: &config::Experts, prefix: &str) -> Result<Experts, ModelError> {
        let hidden = self.config.hidden_size;
        let (prefix, gate, parts) = match experts.layout {
            ExpertLayout::Mixtral => (format!("{prefix}.block_sparse_moe"), "gate", ["w1", "w3", "w2"]),
            ExpertLayout::Qwen2Moe => (format!("{prefix}.mlp"), "gate", DENSE),
            ExpertLayout::Moetify => (format!("{prefix}.mlp"), "router", DENSE),
        };
        let gate = self.gate(experts, format!("{prefix}.{gate}"), hidden)?;
        let expert = |e: i64| self.mlp(None, &format!("{prefix}.experts.{e}"), experts.intermediate_size, parts);
        let (shared, first) = match (experts.shared, experts.layout) {
            (false, _) => (None, 0),
            (true, ExpertLayout::Qwen2Moe) => {
                let inner = experts.shared_intermediate_size;
                let mlp = self.mlp(None, &format!("{prefix}.shared_expert"), inner, parts)?;
                let gate = self.linear(format!("{prefix}.shared_expert_gate"), hidden, 1, false)?;
                (Some(Shared { mlp, gate: Some(gate) }), 0)
            }
            (true, _) => (Some(Shared { mlp: expert(0)?, gate: None }), 1),
        };
        let experts = (first..first + experts.routed()).map(expert).collect::<Result<_, _>>()?;
        Ok(Experts { gate, shared, experts })
    }

    /// A dense MLP, and the differences of the experts from it.
    fn delta_mlp(&self, experts: &config::Experts, prefix: &str) -> Result<DeltaMlp, ModelError> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let part = |name: &str, input, output| {
            let name = format!("{prefix}.{name}");
            let deltas = self.deltas(experts, &name, input, output)?;
            Ok::<_, ModelError>((self.linear(name, input, output, self.config.mlp_bias)?, deltas))
        };
        let routing = self.gate(experts, format!("{prefix}.router"), hidden)?;
        let ((gate, of_gate), (up, of_up)) = (part(DENSE[0], hidden, inner)?, part(DENSE[1], hidden, inner)?);
        let (down, of_down) = part(DENSE[2], inner, hidden)?;
        let deltas = [of_gate, of_up, of_down];
        Ok(DeltaMlp { routing, gate, up, down, deltas, activation: self.config.hidden_act })
    }

    /// One linear layer, or a router with experts if this module of the layer consists of experts.
    fn projection(
        &self,
        (layer, module): (usize, ExpertModule),
        name: String,
        input: i64,
        output: i64,
        bias: bool,
    ) -> Result<Projection, ModelError> {
        let experts = self.config.experts.as_ref().filter(|experts| experts.has(layer, module));
        let Some(experts) = experts else { return Ok(Projection::Dense(self.linear(name, input, output, bias)?)) };
        if experts.storage.is_delta() {
            let deltas = self.deltas(experts, &name, input, output)?;
            let gate = self.gate(experts, format!("{name}.router"), input)?;
            return Ok(Projection::Deltas { gate, base: self.linear(name, input, output, bias)?, deltas });
        }
        let expert = |e: i64| self.linear(format!("{name}.experts.{e}"), input, output, bias);
        let shared = experts.shared.then(|| expert(0)).transpose()?;
        let others = (i64::from(experts.shared)..experts.num_local_experts).map(expert).collect::<Result<_, _>>()?;
        let gate = self.gate(experts, format!("{name}.router"), input)?;
        Ok(Projection::Experts { gate, shared, experts: others })
    }

    /// The experts' differences from the weight of a module.
    fn deltas(&self, experts: &config::Experts, name: &str, input: i64, output: i64) -> Result<Deltas, ModelError> {
        let count = experts.num_local_experts;
        match experts.storage {
            ExpertStorage::Full => unreachable!("asked for by callers of deltas alone"),
            ExpertStorage::LowRank(rank) => {
                let rank = i64::try_from(rank).unwrap_or(i64::MAX).min(input).min(output);
                let [u, v] = low_rank_delta_tensors(name);
                let u = (self.get)(&u, &[count, rank, output])?;
                Ok(Deltas::LowRank { u, v: (self.get)(&v, &[count, rank, input])? })
            }
            ExpertStorage::BitDelta => {
                let [signs, scales] = sign_delta_tensors(name);
                let signs = (self.get)(&signs, &[count, output, (input + 7) / 8])?;
                Ok(Deltas::Signs { signs, scales: (self.get)(&scales, &[count])?, columns: input })
            }
        }
    }

    fn router(&self, experts: &config::Experts, name: String, input: i64) -> Result<Router, ModelError> {
        let router = Router::new(self.linear(name, input, experts.routed(), false)?, experts.num_experts_per_tok);
        Ok(Router { norm_topk_prob: experts.norm_topk_prob, ..router })
    }

    fn gate(&self, experts: &config::Experts, name: String, input: i64) -> Result<Gate, ModelError> {
        match experts.gating {
            ExpertGating::Modules => Ok(Gate::Router(self.router(experts, name, input)?)),
            ExpertGating::Global => Ok(Gate::Global),
            ExpertGating::Gateless => {
                let _ = (self.get)(&name, &[experts.routed()])?;
                Ok(Gate::Gateless { name, experts: experts.routed() })
            }
        }
    }
}
