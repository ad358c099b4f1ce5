//! What a mixture reads and writes, with everything that stands in its way.

use std::collections::BTreeMap;
use std::path::Path;

use cl_checkpoint::{Checkpoint, Dtype, OutputDir, SafetensorsFile, TensorSource, TensorSpec};
use serde_json::{Map, Value};

use crate::names::{self, MATRICES};
use crate::router::{self, RouterRows};
use crate::{Error, FloatType, MixConfig, ModelInfo, Problem, RouterInit};

/// Everything about a mixture that is known without reading a weight.
pub struct Plan {
    pub(crate) config: MixConfig,
    pub(crate) base: Checkpoint,
    pub(crate) experts: Vec<Checkpoint>,
    pub(crate) routers: RouterRows,
    pub(crate) tensors: Vec<Planned>,
    pub(crate) out_config: Map<String, Value>,
    info: ModelInfo,
    /// Things that are worth knowing and stand in nobody's way.
    pub notes: Vec<String>,
}

/// A tensor of the output and what it is made of.
pub(crate) struct Planned {
    pub(crate) spec: TensorSpec,
    pub(crate) source: Source,
}

/// Where a tensor's values come from.
pub(crate) enum Source {
    /// The base's tensor of this name.
    Base(String),
    /// An expert's tensor of this name.
    Expert(usize, String),
    /// The router of a layer.
    Router(usize),
}

/// Keys of config.json in which experts and base have to agree for an expert's MLP to fit.
const FITS: [&str; 4] = ["hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"];
/// Keys that change what an expert's MLP was trained beside.
const BESIDE: [&str; 5] = ["model_type", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings"];

impl Plan {
    /// Opens all models and checks that they make a mixture.
    ///
    /// # Errors
    /// [`Error::Problems`] with everything at once.
    pub fn new(config: &MixConfig) -> Result<Plan, Error> {
        let mut problems = Vec::new();
        let base = note(Checkpoint::open(&config.base_model), "base_model", &mut problems);
        let experts: Vec<Option<Checkpoint>> = (0..)
            .zip(&config.experts)
            .map(|(i, e)| note(Checkpoint::open(&e.model), &format!("experts[{i}]"), &mut problems))
            .collect();
        check_counts(config, &mut problems);
        let (Some(base), Some(experts)) = (base, experts.into_iter().collect::<Option<Vec<_>>>()) else {
            return Err(Error::Problems(problems));
        };
        let mut notes = Vec::new();
        check_base(&base, &mut problems);
        for (i, expert) in experts.iter().enumerate() {
            check_expert(&base, expert, i, &mut problems, &mut notes);
        }
        let dtype = output_dtype(config, &base);
        let tensors = tensors(&base, experts.len(), dtype.dtype(), &mut problems);
        let routers = note(RouterRows::new(config, &base), "router", &mut problems);
        let (Some(routers), true) = (routers, problems.is_empty()) else { return Err(Error::Problems(problems)) };
        notes.extend(routers.notes());
        let info = model_info(&tensors, experts.len(), config.num_experts_per_tok);
        let out_config = out_config(config, &base, dtype);
        Ok(Plan { config: config.clone(), base, experts, routers, tensors, out_config, info, notes })
    }

    /// Checks the output's place, as [`mix`](crate::mix) does before it begins.
    ///
    /// # Errors
    /// Those of [`OutputDir::check`].
    pub fn check_output(&self, out: &Path, overwrite: bool) -> Result<(), Error> {
        let mut inputs = vec![("the base model", self.base.dir())];
        inputs.extend(self.experts.iter().map(|e| ("an expert", e.dir())));
        inputs.extend(self.config.router.states.iter().map(|file| ("the router's states", file.as_path())));
        Ok(OutputDir::check(out, overwrite, &inputs)?)
    }

    /// The tensors that will be written, in the order of the base.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.tensors.iter().map(|t| t.spec.clone()).collect()
    }

    /// Bytes of tensors that will be written.
    pub fn bytes_written(&self) -> u64 {
        self.tensors.iter().map(|t| elements(&t.spec) * t.spec.dtype.bitsize() as u64 / 8).sum()
    }

    /// Parameters by what they are for.
    pub fn info(&self) -> ModelInfo {
        self.info
    }
}

pub(crate) fn note<T, E: ToString>(result: Result<T, E>, place: &str, problems: &mut Vec<Problem>) -> Option<T> {
    result.map_err(|e| problems.push(Problem { place: place.to_owned(), message: e.to_string() })).ok()
}

/// Experts that one mixture may have: beyond it a typing error asks for terabytes.
const MOST_EXPERTS: usize = 1024;

fn check_counts(config: &MixConfig, problems: &mut Vec<Problem>) {
    let (experts, chosen) = (config.experts.len(), config.num_experts_per_tok);
    let mut add = |place: &str, message: String| problems.push(Problem { place: place.to_owned(), message });
    if experts == 0 || experts > MOST_EXPERTS {
        add("experts", format!("{experts} experts; a mixture has 1 to {MOST_EXPERTS}"));
    } else if chosen == 0 || chosen > experts {
        add("num_experts_per_tok", format!("{chosen}; expected 1 to the number of experts, {experts}"));
    }
    match (config.router.init, &config.router.states) {
        (RouterInit::States, None) => add(
            "router.states",
            "init = \"states\" needs a file; `cl moe states CONFIG --out FILE` makes it from the experts' prompts"
                .to_owned(),
        ),
        (init, Some(_)) if init != RouterInit::States => {
            add("router.states", "is read by init = \"states\" only; remove one of the two".to_owned());
        }
        _ => {}
    }
}

/// Only what is built like Llama becomes a Mixtral: the same norms and projections, and no biases.
fn check_base(base: &Checkpoint, problems: &mut Vec<Problem>) {
    let config = base.config();
    let mut add = |message: String| problems.push(Problem { place: "base_model".to_owned(), message });
    let architecture = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).unwrap_or("(none)");
    if !["LlamaForCausalLM", "MistralForCausalLM"].contains(&architecture) {
        add(format!(
            "architecture {architecture} has no mixture in Mixtral's form; LlamaForCausalLM and MistralForCausalLM have"
        ));
    }
    for key in ["attention_bias", "mlp_bias"] {
        if config.get(key).and_then(Value::as_bool) == Some(true) {
            add(format!("{key} is true; a Mixtral has no biases"));
        }
    }
    let unknown: Vec<&str> =
        base.names().into_iter().filter(|n| !names::is_stem(n) && !names::is_replaced(n)).collect();
    if let Some(first) = unknown.first() {
        add(format!("{} tensor(s) have no place in a Mixtral, `{first}` first", unknown.len()));
    }
}

fn check_expert(
    base: &Checkpoint,
    expert: &Checkpoint,
    index: usize,
    problems: &mut Vec<Problem>,
    notes: &mut Vec<String>,
) {
    let (a, b) = (base.config(), expert.config());
    let differ = |key: &&&str| a.get(**key).zip(b.get(**key)).is_some_and(|(a, b)| a != b);
    let place = format!("experts[{index}] ({})", expert.dir().display());
    for key in FITS.iter().filter(differ) {
        let message = format!("`{key}` is {} in config.json, {} in the base's", b[*key], a[*key]);
        problems.push(Problem { place: place.clone(), message });
    }
    for key in BESIDE.iter().filter(differ) {
        notes.push(format!("{place}: `{key}` is {}, {} in the base, which counts", b[*key], a[*key]));
    }
    let replaced = base.names().into_iter().filter(|n| names::is_replaced(n) && n.ends_with(".weight"));
    for name in replaced {
        let (own, theirs) = (base.info(name), expert.info(name));
        match (own, theirs) {
            (Some(own), Some(theirs)) if own.shape == theirs.shape && FloatType::of(theirs.dtype).is_some() => {}
            (Some(own), Some(theirs)) if own.shape == theirs.shape => {
                let message = format!("tensor `{name}` is {:?}; expected f32, f16 or bf16", theirs.dtype);
                problems.push(Problem { place: place.clone(), message });
            }
            (Some(own), Some(theirs)) => {
                let message = format!("tensor `{name}` is {:?}, {:?} in the base", theirs.shape, own.shape);
                problems.push(Problem { place: place.clone(), message });
            }
            _ => {
                let message = format!("lacks tensor `{name}`");
                problems.push(Problem { place, message });
                return; // one missing layer is enough to know
            }
        }
    }
}

fn output_dtype(config: &MixConfig, base: &Checkpoint) -> FloatType {
    let stored = base.info("model.embed_tokens.weight").and_then(|info| FloatType::of(info.dtype));
    config.dtype.or(stored).unwrap_or(FloatType::Bfloat16)
}

fn tensors(base: &Checkpoint, experts: usize, dtype: Dtype, problems: &mut Vec<Problem>) -> Vec<Planned> {
    let mut planned = Vec::new();
    let mut layers: BTreeMap<usize, usize> = BTreeMap::new(); // layer to hidden size
    for name in base.names() {
        let Some(info) = base.info(name) else { continue };
        if names::is_stem(name) {
            if FloatType::of(info.dtype).is_none() {
                let message = format!("tensor `{name}` is {:?}; expected f32, f16 or bf16", info.dtype);
                problems.push(Problem { place: "base_model".to_owned(), message });
            }
            let spec = TensorSpec { name: name.to_owned(), dtype, shape: info.shape.clone() };
            planned.push(Planned { spec, source: Source::Base(name.to_owned()) });
        }
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once(".mlp.gate_proj."));
        if let (Some(layer), Some(&hidden)) = (layer.and_then(|l| l.0.parse().ok()), info.shape.get(1)) {
            layers.insert(layer, hidden);
        }
    }
    for (&layer, &hidden) in &layers {
        let spec = TensorSpec { name: names::router(layer), dtype, shape: vec![experts, hidden] };
        planned.push(Planned { spec, source: Source::Router(layer) });
        for (e, (dense, mixed)) in (0..experts).flat_map(|e| MATRICES.map(|m| (e, m))) {
            let from = names::dense(layer, dense);
            let Some(info) = base.info(&from) else { continue };
            let spec = TensorSpec { name: names::expert(layer, e, mixed), dtype, shape: info.shape.clone() };
            planned.push(Planned { spec, source: Source::Expert(e, from) });
        }
    }
    let count = base.config().get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    if layers.len() as u64 != count {
        let message = format!("num_hidden_layers is {count} in config.json, {} layers have an MLP", layers.len());
        problems.push(Problem { place: "base_model".to_owned(), message });
    }
    planned
}

/// The base's config.json as a Mixtral's.
fn out_config(config: &MixConfig, base: &Checkpoint, dtype: FloatType) -> Map<String, Value> {
    let mut out = base.config().clone();
    let number = |key: &str| out.get(key).and_then(Value::as_u64);
    let heads = number("num_attention_heads").unwrap_or(1);
    // Keys whose defaults differ between the two families are written out.
    let kv_heads = number("num_key_value_heads").unwrap_or(heads);
    let mistral = out.get("model_type").and_then(Value::as_str) == Some("mistral");
    let window = out.get("sliding_window").cloned().unwrap_or(if mistral { 4096.into() } else { Value::Null });
    for (key, value) in [
        ("architectures", Value::from(vec!["MixtralForCausalLM"])),
        ("model_type", "mixtral".into()),
        ("num_local_experts", config.experts.len().into()),
        ("num_experts_per_tok", config.num_experts_per_tok.into()),
        ("num_key_value_heads", kv_heads.into()),
        ("sliding_window", if mistral { window } else { Value::Null }),
        ("output_router_logits", false.into()),
        ("router_aux_loss_coef", 0.001.into()),
        ("router_jitter_noise", 0.0.into()),
        ("torch_dtype", dtype.name().into()),
    ] {
        out.insert(key.to_owned(), value);
    }
    for (key, default) in [("rms_norm_eps", 1e-6.into()), ("tie_word_embeddings", false.into())] {
        out.entry(key.to_owned()).or_insert(default);
    }
    if !out.contains_key("rope_theta") && !out.contains_key("rope_parameters") {
        out.insert("rope_theta".to_owned(), 10_000.0.into());
    }
    if out.contains_key("dtype") {
        out.insert("dtype".to_owned(), dtype.name().into());
    }
    // Llama's own keys, which a Mixtral does not have.
    for key in ["attention_bias", "mlp_bias", "pretraining_tp"] {
        out.shift_remove(key);
    }
    out
}

fn model_info(tensors: &[Planned], experts: usize, chosen: usize) -> ModelInfo {
    let sum = |wanted: fn(&Source) -> bool| {
        tensors.iter().filter(|t| wanted(&t.source)).map(|t| elements(&t.spec)).sum::<u64>()
    };
    ModelInfo::new(
        sum(|s| matches!(s, Source::Base(_))),
        sum(|s| matches!(s, Source::Expert(..))),
        sum(|s| matches!(s, Source::Router(_))),
        experts,
        chosen,
    )
}

fn elements(spec: &TensorSpec) -> u64 {
    spec.shape.iter().product::<usize>() as u64
}

/// Opens the file of hidden states of a router, where the rule asks for one.
pub(crate) fn open_states(config: &MixConfig) -> Result<Option<SafetensorsFile>, Error> {
    match &config.router.states {
        Some(file) if config.router.init == router::STATES => Ok(Some(SafetensorsFile::open(file)?)),
        _ => Ok(None),
    }
}
