//! Plans the inputs and outputs of a mixture of models, and collects all problems.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, Dtype, OutputDir, TensorSource, TensorSpec};
use serde_json::{Map, Value};

use crate::delta::{self, PlannedDelta};
use crate::names::{self, GLOBAL_ROUTER, Layout, Replaced};
use crate::problem::{CountProblem, MOST_EXPERTS, MixProblem, ProblemKind};
use crate::router::RouterRows;
use crate::{
    Error, ExpertStorage, FloatType, MixArchitecture, MixConfig, MixModule, ModelBytes, ModelInfo, Problem,
    RouterConfig, RouterInit, architecture,
};

/// A validated plan of a mixture of models, made without reading weights.
pub struct Plan {
    pub(crate) config: MixConfig,
    pub(crate) base: Checkpoint,
    /// The shared expert, if there is one, followed by the others.
    pub(crate) experts: Vec<Checkpoint>,
    pub(crate) routers: RouterRows,
    pub(crate) tensors: Vec<Planned>,
    /// The differences that the tensors of [`Source::Deltas`] consist of.
    pub(crate) deltas: Vec<PlannedDelta>,
    /// Dtype of all tensors except signs and their scales.
    pub(crate) dtype: Dtype,
    pub(crate) out_config: Map<String, Value>,
    info: ModelInfo,
    /// Notes for the user that are not problems.
    pub notes: Vec<String>,
}

/// A tensor of the output and the source of its values.
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
    /// The shared expert's tensor of this name, times a factor.
    Shared(String, f64),
    /// The router of a layer's module; the router of a whole MLP has no name.
    Router { layer: usize, name: Option<String> },
    /// The router of a layer, computed from the experts' updates of the matrices that it precedes.
    TaskVectors { layer: usize, matrices: Vec<String> },
    /// The gate of a layer's shared expert.
    SharedGate { layer: usize },
    /// A constant value; it is no parameter if it is stored in place of a router.
    Constant { value: f64, is_parameter: bool },
    /// Differences from the base, written separately for each expert.
    Deltas,
}

impl MixConfig {
    /// Which tensors are replaced by experts, and their names.
    pub(crate) fn layout(&self) -> Layout<'_> {
        Layout {
            architecture: self.architecture(),
            modules: &self.modules,
            layers: self.layers.as_deref(),
            shared: self.shared_expert.is_some(),
        }
    }
}

/// Keys of config.json in which experts and base must agree for an expert's MLP to fit.
const FITS: [&str; 4] = ["hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"];
/// Such keys for attention projections.
const FITS_ATTENTION: [&str; 3] = ["num_attention_heads", "num_key_value_heads", "head_dim"];
/// Keys that change the model in which an expert was trained.
const BESIDE: [&str; 7] = [
    "model_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
];

impl Plan {
    /// Opens all models and checks that they can form a mixture.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] with all problems at once.
    pub fn new(config: &MixConfig) -> Result<Plan, Error> {
        let mut problems = Vec::new();
        let base = note(Checkpoint::open(&config.base_model), "base_model", &mut problems);
        let shared = config.shared_expert.iter().map(|shared| ("shared_expert".to_owned(), &shared.model));
        let chosen = (0..).zip(&config.experts).map(|(i, e)| (format!("experts[{i}]"), &e.model));
        let places: Vec<(String, &PathBuf)> = shared.chain(chosen).collect();
        let experts: Vec<Option<Checkpoint>> =
            places.iter().map(|(place, dir)| note(Checkpoint::open(dir), place, &mut problems)).collect();
        check_counts(config, &mut problems);
        let (Some(base), Some(experts)) = (base, experts.into_iter().collect::<Option<Vec<_>>>()) else {
            return Err(Error::Problems(problems));
        };
        let mut notes = Vec::new();
        architecture::check(config, &mut problems);
        check_base(config, &base, &mut problems);
        for ((place, _), expert) in places.iter().zip(&experts) {
            check_expert(config.layout(), &base, expert, place, &mut problems, &mut notes);
        }
        check_modules(config, &base, &mut problems);
        let dtype = output_dtype(config, &base);
        let (tensors, deltas) = tensors(config, &base, dtype.dtype(), &mut problems);
        let routers = note(RouterRows::new(config, &base), "router", &mut problems);
        let (Some(routers), true) = (routers, problems.is_empty()) else { return Err(Error::Problems(problems)) };
        notes.extend(routers.notes());
        let info = model_info(&tensors, &deltas, &base, dtype.dtype(), config);
        let out_config = architecture::out_config(config, &base, dtype);
        let (config, dtype) = (config.resolved(), dtype.dtype());
        Ok(Plan { config, base, experts, routers, tensors, deltas, dtype, out_config, info, notes })
    }

    /// Checks the output path, as [`mix`](crate::mix) does first.
    ///
    /// # Errors
    /// Returns the errors of [`OutputDir::check`].
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

    /// Number of bytes of tensors that will be written.
    pub fn bytes_written(&self) -> u64 {
        self.tensors.iter().map(|t| bytes(&t.spec)).sum()
    }

    /// Parameter counts by purpose.
    pub fn info(&self) -> ModelInfo {
        self.info
    }
}

pub(crate) fn note<T, E: Into<ProblemKind>>(
    result: Result<T, E>,
    place: &str,
    problems: &mut Vec<Problem>,
) -> Option<T> {
    result.map_err(|e| problems.push(Problem::new(place, e))).ok()
}

fn check_counts(config: &MixConfig, problems: &mut Vec<Problem>) {
    let (experts, chosen) = (config.experts.len(), config.top_k());
    let mut add = |place: &str, problem: CountProblem| problems.push(Problem::new(place, problem));
    if experts == 0 || experts > MOST_EXPERTS {
        add("experts", CountProblem::Experts { experts, most: MOST_EXPERTS });
    } else if chosen == 0 || chosen > experts {
        add("num_experts_per_tok", CountProblem::Chosen { chosen, experts });
    } else if config.gateless && chosen != experts {
        add("num_experts_per_tok", CountProblem::ChosenWithoutRouter { chosen, experts });
    }
    let mut add = |place: &str, problem: MixProblem| problems.push(Problem::new(place, problem));
    check_gating(config, &mut add);
    match (config.router.init, &config.router.states) {
        (RouterInit::States, None) => add("router.states", MixProblem::NoStates),
        (init, Some(_)) if init != RouterInit::States => {
            add("router.states", MixProblem::UnusedStates);
        }
        _ => {}
    }
}

/// Checks that at most one setting determines the selection of experts, and that it has the settings that it needs.
fn check_gating(config: &MixConfig, add: &mut dyn FnMut(&str, MixProblem)) {
    let set = [
        ("gateless", config.gateless),
        ("global_router", config.global_router),
        ("shared_expert", config.shared_expert.is_some()),
    ];
    let set: Vec<&'static str> = set.into_iter().filter(|(_, on)| *on).map(|(key, _)| key).collect();
    if let [first, second, ..] = set[..] {
        add(first, MixProblem::Exclusive { other: second });
    }
    if config.gateless && config.router != RouterConfig::default() {
        add("router", MixProblem::NoRouter);
    }
}

/// Whether the base has biases on q, k and v, which the output keeps.
fn has_biases(base: &Checkpoint) -> bool {
    architecture::base_architecture(base) == architecture::QWEN2
}

/// Checks that the base has Llama's structure: the same norms and projections, and no biases except those of q, k and v
/// if the output has them.
fn check_base(mixture: &MixConfig, base: &Checkpoint, problems: &mut Vec<Problem>) {
    let config = base.config();
    let mut add = |problem: MixProblem| problems.push(Problem::new("base_model", problem));
    match architecture::base_architecture(base) {
        "LlamaForCausalLM" | "MistralForCausalLM" => {}
        architecture::QWEN2 if mixture.architecture() == MixArchitecture::Qwen2Moe => {}
        architecture::QWEN2 => {
            add(MixProblem::Qwen2Biases { base: architecture::QWEN2, output: mixture.architecture().name() });
        }
        other => add(MixProblem::Architecture { architecture: other.to_owned() }),
    }
    for key in ["attention_bias", "mlp_bias"] {
        if config.get(key).and_then(Value::as_bool) == Some(true) {
            add(MixProblem::Biases { key });
        }
    }
    let unknown: Vec<&str> =
        base.names().into_iter().filter(|n| !names::is_known(n, has_biases(base)) && !names::is_buffer(n)).collect();
    if let Some(first) = unknown.first() {
        add(MixProblem::Unplaced { count: unknown.len(), first: (*first).to_owned() });
    }
}

/// Checks that the modules to replace exist, occur once, and have routers that can be initialized as configured.
fn check_modules(config: &MixConfig, base: &Checkpoint, problems: &mut Vec<Problem>) {
    let mut add = |place: &str, problem: MixProblem| problems.push(Problem::new(place, problem));
    let modules = &config.modules;
    let twice = modules.iter().enumerate().any(|(i, module)| modules[..i].contains(module));
    if modules.is_empty() || twice {
        add("modules", MixProblem::Modules);
    }
    let has = |module| modules.contains(&module);
    if has(MixModule::Mlp) && has(MixModule::MlpFg) {
        add("modules", MixProblem::TwoMlps);
    }
    let of_other_inputs = has(MixModule::OProj) || has(MixModule::MlpFg);
    match config.router.init {
        RouterInit::States if !config.global_router && of_other_inputs => {
            add("router.init", MixProblem::StatesOfInput);
        }
        RouterInit::TaskVectors if config.global_router => add("router.init", MixProblem::GlobalTaskVectors),
        RouterInit::TaskVectors if of_other_inputs => add("router.init", MixProblem::TaskVectorsOfInput),
        _ => {}
    }
    if config.expert_storage.is_delta() && config.shared_expert.is_some() {
        add("expert_storage", MixProblem::SharedDelta);
    }
    let count = base.config().get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
    if let Some(scale) = config.shared_expert.as_ref().map(|shared| shared.residual_scale)
        && !(scale.is_finite() && scale != 0.0)
    {
        add("shared_expert.residual_scale", MixProblem::Scale { scale });
    }
    match &config.layers {
        Some(layers) if layers.is_empty() => add("layers", MixProblem::NoLayers),
        Some(layers) => {
            if let Some(&layer) = layers.iter().find(|layer| **layer >= count) {
                add("layers", MixProblem::Layer { layer, count });
            }
            if let Some((_, &layer)) = layers.iter().enumerate().find(|(i, layer)| layers[..*i].contains(layer)) {
                add("layers", MixProblem::LayerTwice { layer });
            }
        }
        None => {}
    }
}

fn check_expert(
    layout: Layout<'_>,
    base: &Checkpoint,
    expert: &Checkpoint,
    place: &str,
    problems: &mut Vec<Problem>,
    notes: &mut Vec<String>,
) {
    let (a, b) = (base.config(), expert.config());
    let differ = |key: &&&str| a.get(**key).zip(b.get(**key)).is_some_and(|(a, b)| a != b);
    let place = format!("{place} ({})", expert.dir().display());
    let attention = layout.modules.iter().any(|module| module.attention().is_some());
    let of_attention = if attention { &FITS_ATTENTION[..] } else { &[] };
    for key in FITS.iter().chain(of_attention).filter(differ) {
        let problem = MixProblem::Config { key, expert: b[*key].clone(), base: a[*key].clone() };
        problems.push(Problem::new(&place, problem));
    }
    for key in BESIDE.iter().filter(differ) {
        notes.push(format!("{place}: `{key}` is {}, {} in the base, which counts", b[*key], a[*key]));
    }
    let beside: Vec<&str> =
        expert.names().into_iter().filter(|name| layout.is_of_module(name) && base.info(name).is_none()).collect();
    if let Some(first) = beside.first() {
        let problem = MixProblem::Beside { count: beside.len(), first: (*first).to_owned() };
        problems.push(Problem::new(&place, problem));
    }
    let replaced = base.names().into_iter().filter(|name| layout.replaced(name).is_some());
    for name in replaced {
        let (own, theirs) = (base.info(name), expert.info(name));
        match (own, theirs) {
            (Some(own), Some(theirs)) if own.shape == theirs.shape && FloatType::of(theirs.dtype).is_some() => {}
            (Some(own), Some(theirs)) if own.shape == theirs.shape => {
                let problem = MixProblem::Dtype { tensor: name.to_owned(), dtype: theirs.dtype };
                problems.push(Problem::new(&place, problem));
            }
            (Some(own), Some(theirs)) => {
                let (expert, base) = (theirs.shape.clone(), own.shape.clone());
                problems.push(Problem::new(&place, MixProblem::Shape { tensor: name.to_owned(), expert, base }));
            }
            _ => {
                problems.push(Problem::new(&place, MixProblem::Lacks { tensor: name.to_owned() }));
                return; // one missing layer is enough to report
            }
        }
    }
}

fn output_dtype(config: &MixConfig, base: &Checkpoint) -> FloatType {
    let stored = base.info("model.embed_tokens.weight").and_then(|info| FloatType::of(info.dtype));
    config.dtype.or(stored).unwrap_or(FloatType::Bfloat16)
}

fn tensors(
    config: &MixConfig,
    base: &Checkpoint,
    dtype: Dtype,
    problems: &mut Vec<Problem>,
) -> (Vec<Planned>, Vec<PlannedDelta>) {
    let (layout, experts, storage) = (config.layout(), config.experts.len(), config.expert_storage);
    let gated = config.has_gated_shared_expert();
    let (mut planned, mut deltas) = (Vec::new(), Vec::new());
    let mut gates = BTreeSet::new();
    for name in base.names() {
        let Some(info) = base.info(name).filter(|_| names::is_known(name, has_biases(base))) else { continue };
        if FloatType::of(info.dtype).is_none() {
            let problem = MixProblem::Dtype { tensor: name.to_owned(), dtype: info.dtype };
            problems.push(Problem::new("base_model", problem));
        }
        let mut add = |name, shape, source| {
            planned.push(Planned { spec: TensorSpec { name, dtype, shape }, source });
        };
        let Some(of) = layout.replaced(name) else {
            add(name.to_owned(), info.shape.clone(), Source::Base(name.to_owned()));
            continue;
        };
        // The router of a whole MLP reads the same input as gate and up.
        let of_whole = of.module == MixModule::Mlp;
        let router = layout.router(if of_whole { Replaced { matrix: "gate_proj", ..of } } else { of });
        if let (Some(&input), true) = (info.shape.get(1), !of_whole || of.matrix == "gate_proj")
            && gates.insert(router.clone())
        {
            let weight = format!("{router}.weight");
            if config.gateless {
                // moetify stores a buffer of equal weights.
                let source = Source::Constant { value: 1.0 / experts as f64, is_parameter: false };
                add(router, vec![experts], source);
            } else if !config.global_router {
                let source = if config.router.init == RouterInit::TaskVectors {
                    let matrices = if of_whole { names::read_by_mlp(of.layer).into() } else { vec![name.to_owned()] };
                    Source::TaskVectors { layer: of.layer, matrices }
                } else {
                    Source::Router { layer: of.layer, name: (!of_whole).then(|| weight.clone()) }
                };
                add(weight, vec![experts, input], source);
            }
            if let Some(name) = layout.shared_gate(of.layer) {
                let source = if gated {
                    Source::SharedGate { layer: of.layer }
                } else {
                    // Zeros give sigmoid(0) = 1/2 for every token, so the shared expert is doubled below.
                    Source::Constant { value: 0.0, is_parameter: true }
                };
                add(name, vec![1, input], source);
            }
        }
        if let (true, &[rows, columns]) = (storage.is_delta(), info.shape.as_slice()) {
            let (module, shape) = (name.strip_suffix(".weight").unwrap_or(name), [rows, columns]);
            add(name.to_owned(), info.shape.clone(), Source::Base(name.to_owned()));
            let specs = delta::specs(storage, module, shape, experts, dtype);
            planned.extend(specs.into_iter().map(|spec| Planned { spec, source: Source::Deltas }));
            deltas.extend((0..experts).map(|expert| PlannedDelta { expert, tensor: name.to_owned(), shape }));
            continue;
        }
        if let Some(shared) = &config.shared_expert {
            // The factor applies to the expert's output, which the last matrix of a whole MLP produces.
            let halved = !gated && layout.shared_gate(of.layer).is_some();
            let of_output = if halved { 2.0 } else { 1.0 } * shared.residual_scale;
            let scale = if of_whole && of.matrix != "down_proj" { 1.0 } else { of_output };
            add(layout.shared_expert(of), info.shape.clone(), Source::Shared(name.to_owned(), scale));
        }
        let first = usize::from(config.shared_expert.is_some());
        for e in 0..experts {
            add(layout.expert(of, e), info.shape.clone(), Source::Expert(first + e, name.to_owned()));
        }
    }
    if config.global_router {
        let hidden = base.info("model.embed_tokens.weight").and_then(|info| info.shape.get(1)).copied().unwrap_or(0);
        let source = Source::Router { layer: 0, name: Some(GLOBAL_ROUTER.to_owned()) };
        let spec = TensorSpec { name: GLOBAL_ROUTER.to_owned(), dtype, shape: vec![experts, hidden] };
        planned.push(Planned { spec, source });
    }
    let layers: BTreeSet<usize> = base.names().into_iter().filter_map(names::layer_with_mlp).collect();
    let count = base.config().get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    if layers.len() as u64 != count {
        problems.push(Problem::new("base_model", MixProblem::LayerCount { stated: count, found: layers.len() }));
    }
    (planned, deltas)
}

fn model_info(
    tensors: &[Planned],
    deltas: &[PlannedDelta],
    base: &Checkpoint,
    dtype: Dtype,
    config: &MixConfig,
) -> ModelInfo {
    let is_expert = |source: &Source| matches!(source, Source::Expert(..) | Source::Deltas);
    let is_stem = |source: &Source| {
        let of_shared = matches!(source, Source::Shared(..) | Source::SharedGate { .. });
        of_shared || matches!(source, Source::Base(_) | Source::Constant { is_parameter: true, .. })
    };
    let sum = |wanted: &dyn Fn(&Source) -> bool, count: fn(&TensorSpec) -> u64| {
        tensors.iter().filter(|t| wanted(&t.source)).map(|t| count(&t.spec)).sum::<u64>()
    };
    // A byte holds the signs of eight weights, or of fewer at the end of a row.
    let whole = |spec: &TensorSpec| if spec.dtype == Dtype::U8 { 0 } else { elements(spec) };
    let signs: usize = match config.expert_storage {
        ExpertStorage::BitDelta => deltas.iter().map(|delta| delta.shape[0] * delta.shape[1]).sum(),
        _ => 0,
    };
    let of_base = |name: &str| base.info(name).map_or(0, |info| info.elements() * dtype.bitsize() / 8) as u64;
    let known = base.names().into_iter().filter(|name| names::is_known(name, has_biases(base)));
    let bytes = ModelBytes {
        base_bytes: known.map(of_base).sum(),
        expert_bytes: sum(&is_expert, bytes),
        total_bytes: sum(&|_| true, bytes),
    };
    let info = ModelInfo::new(
        sum(&is_stem, elements),
        sum(&is_expert, whole) + signs as u64,
        sum(&|s| matches!(s, Source::Router { .. } | Source::TaskVectors { .. }), elements),
        config.experts.len(),
        config.top_k(),
    );
    ModelInfo { bytes: Some(bytes), ..info }
}

fn bytes(spec: &TensorSpec) -> u64 {
    elements(spec) * spec.dtype.bitsize() as u64 / 8
}

fn elements(spec: &TensorSpec) -> u64 {
    spec.shape.iter().product::<usize>() as u64
}
