//! Output architectures of mixtures: what each of them supports, and its config.json.

use cl_checkpoint::Checkpoint;
use serde_json::{Map, Value};

use crate::problem::MixProblem;
use crate::{FloatType, MixArchitecture, MixConfig, MixModule, Problem};

/// Architecture of bases with biases on q, k and v.
pub(crate) const QWEN2: &str = "Qwen2ForCausalLM";

/// Returns the architecture of a base.
pub(crate) fn base_architecture(base: &Checkpoint) -> &str {
    base.config().get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or("(none)")
}

/// Reports everything that the output architecture does not support.
pub(crate) fn check(config: &MixConfig, problems: &mut Vec<Problem>) {
    let architecture = config.architecture();
    let mut refuse = |key, reason| {
        problems.push(Problem::new(key, MixProblem::Output { architecture: architecture.name(), reason, key }));
    };
    if architecture == MixArchitecture::Moetify {
        if config.has_gated_shared_expert() {
            refuse("shared_expert.positive_prompts", "has no gate of the shared expert");
        }
        return;
    }
    let of_qwen = architecture == MixArchitecture::Qwen2Moe;
    let wrong = [
        ("modules", config.modules != [MixModule::Mlp], "supports only experts of whole MLPs"),
        ("layers", config.layers.is_some() && !of_qwen, "has experts in every layer"),
        ("expert_storage", config.expert_storage.is_delta(), "supports only full experts"),
        ("gateless", config.gateless, "has a router in every layer"),
        ("global_router", config.global_router, "has a router in every layer"),
        ("shared_expert", config.shared_expert.is_some() && !of_qwen, "has no shared expert"),
        ("shared_expert", config.shared_expert.is_none() && of_qwen, "needs a shared expert"),
    ];
    for (key, _, reason) in wrong.into_iter().filter(|(_, wrong, _)| *wrong) {
        refuse(key, reason);
    }
}

/// Converts the base's config.json to that of the mixture.
pub(crate) fn out_config(config: &MixConfig, base: &Checkpoint, dtype: FloatType) -> Map<String, Value> {
    match config.architecture() {
        MixArchitecture::Mixtral => mixtral_config(config, base, dtype),
        MixArchitecture::Qwen2Moe => qwen2_moe_config(config, base, dtype),
        MixArchitecture::Moetify => moetify_config(config, base, dtype),
    }
}

/// The config of the paper's tool, whose keys name the modules that consist of experts.
fn moetify_config(config: &MixConfig, base: &Checkpoint, dtype: FloatType) -> Map<String, Value> {
    let mut out = base.config().clone();
    let mistral = out.get("model_type").and_then(Value::as_str) == Some("mistral");
    // Experts stored as differences get separate class names: the paper's tool would not find these experts and would
    // initialize them at random.
    let (class, kind) = match (mistral, config.expert_storage.is_delta()) {
        (false, false) => ("MoeLlamaForCausalLM", "moellama"),
        (true, false) => ("MoeMistralForCausalLM", "moemistral"),
        (false, true) => ("DeltaMoeLlamaForCausalLM", "delta_moellama"),
        (true, true) => ("DeltaMoeMistralForCausalLM", "delta_moemistral"),
    };
    if config.expert_storage.is_delta() {
        out.insert("expert_storage".to_owned(), config.expert_storage.to_string().into());
    }
    let has = |module| Value::from(config.modules.contains(&module));
    for (key, value) in [
        ("architectures", Value::from(vec![class])),
        ("model_type", kind.into()),
        ("num_local_experts", (config.experts.len() + usize::from(config.shared_expert.is_some())).into()),
        ("always_on", config.shared_expert.is_some().into()),
        ("gateless", config.gateless.into()),
        ("global_router", config.global_router.into()),
        ("num_experts_per_tok", config.top_k().into()),
        ("moe_mlp", has(MixModule::Mlp)),
        ("moe_mlp_fg", has(MixModule::MlpFg)),
        ("moe_query", has(MixModule::QProj)),
        ("moe_key", has(MixModule::KProj)),
        ("moe_value", has(MixModule::VProj)),
        ("moe_output", has(MixModule::OProj)),
        ("moe_layer_idx", config.layers.clone().unwrap_or_default().into()),
        ("output_router_logits", false.into()),
    ] {
        out.insert(key.to_owned(), value);
    }
    set_dtype(&mut out, dtype);
    out
}

fn mixtral_config(config: &MixConfig, base: &Checkpoint, dtype: FloatType) -> Map<String, Value> {
    let mut out = base.config().clone();
    let number = |key: &str| out.get(key).and_then(Value::as_u64);
    let heads = number("num_attention_heads").unwrap_or(1);
    // Keys whose defaults differ between the two families are written explicitly.
    let kv_heads = number("num_key_value_heads").unwrap_or(heads);
    let mistral = out.get("model_type").and_then(Value::as_str) == Some("mistral");
    let window = out.get("sliding_window").cloned().unwrap_or(if mistral { 4096.into() } else { Value::Null });
    for (key, value) in [
        ("architectures", Value::from(vec!["MixtralForCausalLM"])),
        ("model_type", "mixtral".into()),
        ("num_local_experts", config.experts.len().into()),
        ("num_experts_per_tok", config.top_k().into()),
        ("num_key_value_heads", kv_heads.into()),
        ("sliding_window", if mistral { window } else { Value::Null }),
        ("output_router_logits", false.into()),
        ("router_aux_loss_coef", 0.001.into()),
        ("router_jitter_noise", 0.0.into()),
    ] {
        out.insert(key.to_owned(), value);
    }
    write_defaults(&mut out);
    set_dtype(&mut out, dtype);
    out
}

fn qwen2_moe_config(config: &MixConfig, base: &Checkpoint, dtype: FloatType) -> Map<String, Value> {
    let mut out = base.config().clone();
    let windows = Windows::of(base);
    let layers = out.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
    let dense: Vec<usize> = match &config.layers {
        Some(chosen) => (0..layers).filter(|layer| !chosen.contains(layer)).collect(),
        None => Vec::new(),
    };
    let width = out.get("intermediate_size").cloned().unwrap_or_default();
    // Keys whose defaults differ between the families are written explicitly.
    let heads = out.get("num_attention_heads").and_then(Value::as_u64).unwrap_or(1);
    let default = if base_architecture(base) == QWEN2 { 32 } else { heads };
    let kv_heads = out.get("num_key_value_heads").and_then(Value::as_u64).unwrap_or(default);
    for (key, value) in [
        ("architectures", Value::from(vec!["Qwen2MoeForCausalLM"])),
        ("model_type", "qwen2_moe".into()),
        ("num_key_value_heads", kv_heads.into()),
        ("qkv_bias", (base_architecture(base) == QWEN2).into()),
        ("use_sliding_window", windows.size.is_some().into()),
        ("sliding_window", windows.size.into()),
        ("max_window_layers", layers.into()),
        ("layer_types", windows.layer_types.into()),
        ("decoder_sparse_step", 1.into()),
        ("mlp_only_layers", dense.into()),
        ("moe_intermediate_size", width.clone()),
        ("shared_expert_intermediate_size", width),
        ("num_experts", config.experts.len().into()),
        ("num_experts_per_tok", config.top_k().into()),
        ("norm_topk_prob", true.into()),
        ("output_router_logits", false.into()),
        ("router_aux_loss_coef", 0.001.into()),
    ] {
        out.insert(key.to_owned(), value);
    }
    write_defaults(&mut out);
    set_dtype(&mut out, dtype);
    out
}

/// Sliding windows of a base by layer.
struct Windows {
    /// Number of positions that a query attends to; `None` if no layer has a window.
    size: Option<u64>,
    layer_types: Vec<&'static str>,
}

impl Windows {
    /// Reads the windows as Transformers does for Llama, Mistral and Qwen2.
    fn of(base: &Checkpoint) -> Windows {
        let config = base.config();
        let number = |key: &str, default| config.get(key).map_or(default, Value::as_u64);
        let layers = number("num_hidden_layers", None).unwrap_or(0);
        let (size, first) = match base_architecture(base) {
            "MistralForCausalLM" => (number("sliding_window", Some(4096)), 0),
            QWEN2 if config.get("use_sliding_window").and_then(Value::as_bool) == Some(true) => {
                (number("sliding_window", Some(4096)), number("max_window_layers", Some(28)).unwrap_or(28))
            }
            _ => (None, 0),
        };
        let named = config.get("layer_types").and_then(Value::as_array).filter(|_| size.is_some());
        let has = |layer: u64| match named.and_then(|types| types.get(layer as usize)) {
            Some(name) => name == "sliding_attention",
            None => size.is_some() && layer >= first,
        };
        let name = |layer| if has(layer) { "sliding_attention" } else { "full_attention" };
        Windows { size, layer_types: (0..layers).map(name).collect() }
    }
}

/// Writes keys whose defaults differ between families explicitly, and removes keys that only Llama has.
fn write_defaults(out: &mut Map<String, Value>) {
    for (key, default) in [("rms_norm_eps", 1e-6.into()), ("tie_word_embeddings", false.into())] {
        out.entry(key.to_owned()).or_insert(default);
    }
    if !out.contains_key("rope_theta") && !out.contains_key("rope_parameters") {
        out.insert("rope_theta".to_owned(), 10_000.0.into());
    }
    for key in ["attention_bias", "mlp_bias", "pretraining_tp"] {
        out.shift_remove(key);
    }
}

/// Transformers reads `dtype` since version 5, and `torch_dtype` before.
fn set_dtype(out: &mut Map<String, Value>, dtype: FloatType) {
    for key in ["torch_dtype", "dtype"] {
        if key == "torch_dtype" || out.contains_key(key) {
            out.insert(key.to_owned(), dtype.name().into());
        }
    }
}
