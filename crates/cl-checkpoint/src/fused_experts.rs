//! Adapters with PEFT's `target_parameters`: Transformers 5 fuses the experts of a layer into one parameter per
//! projection, and PEFT adapts such a parameter instead of a module. They are expanded to ordinary factors of every
//! expert's linear layers when an adapter is opened.
//!
//! The format is that of PEFT 0.21's `ParamWrapper` (`peft/tuners/lora/layer.py`). For `E` experts of a module `M`, such
//! as `model.layers.0.mlp.experts`, with a rank `r` from the configuration, where patterns match `M.PARAMETER`:
//!
//! | | |
//! | --- | --- |
//! | names | `base_model.model.M.lora_A.weight` and `lora_B.weight`, without the parameter's name |
//! | several parameters of `M` | nested: the last one that the module declares has these names, each one before it one more `.base_layer`; with both, `M.lora_A` is that of `down_proj`, and `M.base_layer.lora_A` that of `gate_up_proj` |
//! | `lora_A` | `[E·r, in]`, expert-major: expert `e` has the rows from `e·r` to `(e + 1)·r` |
//! | `lora_B` | `[out, E·r]`, rank-major: expert `e` has the columns `k·E + e` for `k < r` |
//! | update | `ΔW_e = scaling · B_e·A_e` of the expert's weight `[out, in]`, with the scaling of rank `r` |
//! | `gate_up_proj` | the first half of `out` is the gate's projection, the second half the up projection |
//! | parameters of two dimensions | `E = 1`: ordinary factors, of the module that has the parameter `weight` |
//!
//! Adapters written by `fuse_experts.rs` have factors in blocks: the ranks of a parameter's projections follow each
//! other, and the rest of `lora_B` is zero. The entry [`RANKS`] of the file's metadata has the ranks of the modules, so
//! that they are read as they were written; without it, all modules of a parameter get its rank, with the same update.
//!
//! Models are stored with one module per expert, under names that depend on the family: `mlp.experts.E.gate_proj`,
//! `up_proj` and `down_proj`, or Mixtral's `block_sparse_moe.experts.E.w1`, `w3` and `w2`. The adapter does not contain
//! them, see [`Adapter::named_for`](crate::Adapter::named_for).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter::{LayerKind, PREFIX};
use crate::adapter_config::{alpha_for, nearly};
use crate::files::{MAX_CONFIG, read_file};
use crate::problem::AdapterProblem;
use crate::{
    AdapterConfig, BaseExperts, Error, ModulePattern, SafetensorsFile, TargetModules, TensorInfo, TensorSource,
};

pub(crate) const KEY: &str = "target_parameters";
/// Key of the metadata with the ranks of factors in blocks, [`ExpertRanks`] as JSON.
pub(crate) const RANKS: &str = "expert_ranks";
/// The parameters of fused experts, in the order in which the modules declare them.
pub(crate) const OF_EXPERTS: [&str; 2] = ["gate_up_proj", "down_proj"];
/// The parameter of routers and linear layers.
pub(crate) const WEIGHT: &str = "weight";
pub(crate) const INNER: &str = ".base_layer";

/// For every module of experts in the checkpoint, such as `model.layers.0.mlp.experts`, the ranks by projection.
pub(crate) type ExpertRanks = BTreeMap<String, BTreeMap<String, Ranks>>;

/// Ranks of one projection of the experts; 0 for a module without factors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Ranks {
    /// The same rank for all experts.
    All(usize),
    /// One rank per expert.
    Each(Vec<usize>),
}

impl Ranks {
    fn of(&self, expert: usize) -> usize {
        match self {
            Ranks::All(rank) => *rank,
            Ranks::Each(ranks) => ranks.get(expert).copied().unwrap_or(0),
        }
    }

    fn max(&self) -> usize {
        match self {
            Ranks::All(rank) => *rank,
            Ranks::Each(ranks) => ranks.iter().copied().max().unwrap_or(0),
        }
    }
}

/// The names of experts in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `mlp.experts.E.gate_proj`, `up_proj`, `down_proj`.
    Mlp,
    /// `block_sparse_moe.experts.E.w1`, `w3`, `w2`.
    Mixtral,
}

impl Layout {
    pub(crate) fn other(self) -> Layout {
        match self {
            Layout::Mlp => Layout::Mixtral,
            Layout::Mixtral => Layout::Mlp,
        }
    }

    /// The layout of a module of experts in a checkpoint.
    pub(crate) fn of_module(experts: &str) -> Option<Layout> {
        let named = |end: &str| experts.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        match () {
            () if named("mlp.experts") => Some(Layout::Mlp),
            () if named("block_sparse_moe.experts") => Some(Layout::Mixtral),
            () => None,
        }
    }

    /// The name in Transformers 5 of a module of a checkpoint.
    pub(crate) fn fused_module(self, module: &str) -> String {
        let renamed = ["experts", "gate"].into_iter().find_map(|part| {
            let layer = module.strip_suffix(part)?.strip_suffix("block_sparse_moe.")?;
            (self == Layout::Mixtral).then(|| format!("{layer}mlp.{part}"))
        });
        renamed.unwrap_or_else(|| module.to_owned())
    }

    /// The name in checkpoints of a module of Transformers 5.
    pub(crate) fn module(self, module: &str) -> String {
        let renamed = ["experts", "gate"].into_iter().find_map(|part| {
            let layer = module.strip_suffix(part)?.strip_suffix("mlp.")?;
            let whole = layer.is_empty() || layer.ends_with('.');
            (whole && self == Layout::Mixtral).then(|| format!("{layer}block_sparse_moe.{part}"))
        });
        renamed.unwrap_or_else(|| module.to_owned())
    }

    /// The projections of a parameter of experts, in the order of its rows.
    pub(crate) fn projections(self, parameter: &str) -> &'static [&'static str] {
        match (self, parameter == OF_EXPERTS[0]) {
            (Layout::Mlp, true) => &["gate_proj", "up_proj"],
            (Layout::Mlp, false) => &["down_proj"],
            (Layout::Mixtral, true) => &["w1", "w3"],
            (Layout::Mixtral, false) => &["w2"],
        }
    }

    /// Finds the layout from what the configuration says about the base: its `config.json` if it is a directory here,
    /// or else its name or class. The layout of an unknown base is [`Layout::Mlp`]; `None` for a family whose experts
    /// are stored transposed, so that their factors mean something else.
    fn of_base(config: &AdapterConfig) -> Option<Layout> {
        let name = config.base_model_name_or_path.as_deref().unwrap_or_default();
        let class = config.other.get("auto_mapping").and_then(|of| of["base_model_class"].as_str());
        let known = model_type(name).unwrap_or_else(|| format!("{name} {}", class.unwrap_or_default()));
        let known = known.to_lowercase().replace(['-', '_'], "");
        match () {
            () if known.contains("gptoss") || known.contains("llama4") => None,
            () if known.contains("mixtral") => Some(Layout::Mixtral),
            () => Some(Layout::Mlp),
        }
    }
}

/// Returns the `model_type` of a model directory.
fn model_type(dir: &str) -> Option<String> {
    // On Windows, opening a path of this form contacts another computer, which no adapter from elsewhere may cause.
    if dir.is_empty() || dir.starts_with("\\\\") || dir.starts_with("//") {
        return None;
    }
    let path = Path::new(dir).join("config.json");
    let text = path.is_file().then(|| read_file(&path, MAX_CONFIG).ok())??;
    let config: Value = serde_json::from_slice(&text).ok()?;
    config["model_type"].as_str().map(str::to_owned)
}

/// The tensors and the configuration of an adapter after expansion.
pub(crate) struct Expanded {
    /// Without `target_parameters`; ranks, alphas and target modules are those of the expanded modules.
    pub(crate) config: AdapterConfig,
    pub(crate) layout: Layout,
    /// A module whose name depends on the layout.
    pub(crate) witness: Option<String>,
    /// The numbers of experts in the base.
    pub(crate) experts: BaseExperts,
    tensors: BTreeMap<String, Part>,
}

/// A tensor of an expanded adapter.
struct Part {
    info: TensorInfo,
    /// The tensor of the file that contains it.
    source: String,
    place: Place,
}

/// Where in its source a tensor is.
enum Place {
    Whole,
    /// A range of bytes.
    Range(Range<usize>),
    /// Some columns of some rows, collected when they are first read.
    Columns {
        rows: Range<usize>,
        /// Number of columns of the source.
        of: usize,
        first: usize,
        step: usize,
        /// Number of columns of the part.
        count: usize,
        bytes: OnceLock<Vec<u8>>,
    },
}

impl Expanded {
    pub(crate) fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|part| &part.info)
    }

    pub(crate) fn bytes<'a>(&'a self, file: &'a SafetensorsFile, name: &str) -> Result<&'a [u8], Error> {
        let missing = || Error::TensorNotFound { path: file.path().to_owned(), tensor: name.to_owned() };
        let part = self.tensors.get(name).ok_or_else(missing)?;
        let all = file.bytes(&part.source)?;
        Ok(match &part.place {
            Place::Whole => all,
            Place::Range(range) => &all[range.clone()],
            Place::Columns { rows, of, first, step, count, bytes } => bytes.get_or_init(|| {
                let size = part.info.dtype.bitsize() / 8;
                let element = |row: usize, column: usize| &all[(row * of + column) * size..][..size];
                let columns = || (*first..*of).step_by(*step).take(*count);
                rows.clone().flat_map(|row| columns().flat_map(move |column| element(row, column)).copied()).collect()
            }),
        })
    }
}

/// A parameter that an adapter changes.
struct Parameter<'a> {
    /// Name of the module in Transformers 5.
    module: &'a str,
    name: &'static str,
    rank: usize,
    experts: usize,
    /// Names and headers of its factors in the file.
    factors: [(String, &'a TensorInfo); 2],
    /// The ranks of its projections, if they are blocks of the parameter's rank.
    blocks: Option<Vec<Ranks>>,
}

/// A module of an expanded parameter.
struct Module {
    name: String,
    /// Position of the projection in the parameter.
    projection: usize,
    /// The first component of the parameter's rank that belongs to the module, and their number.
    first: usize,
    rank: usize,
}

impl Parameter<'_> {
    fn full(&self) -> String {
        format!("{}.{}", self.module, self.name)
    }

    fn is_of_experts(&self) -> bool {
        self.name != WEIGHT
    }

    /// The modules of an expert that it consists of, in the order of its rows; without fused experts, the only module.
    fn names(&self, layout: Layout, expert: usize) -> Vec<String> {
        let module = layout.module(self.module);
        if !self.is_of_experts() {
            return vec![module];
        }
        layout.projections(self.name).iter().map(|projection| format!("{module}.{expert}.{projection}")).collect()
    }

    /// The modules of an expert that have factors.
    fn modules(&self, layout: Layout, expert: usize) -> Vec<Module> {
        let mut next = 0;
        let place = |(projection, name): (usize, String)| {
            let Some(blocks) = &self.blocks else { return Module { name, projection, first: 0, rank: self.rank } };
            let first = next;
            next += blocks[projection].max();
            Module { name, projection, first, rank: blocks[projection].of(expert) }
        };
        let modules = self.names(layout, expert).into_iter().enumerate().map(place);
        modules.filter(|module| module.rank > 0).collect()
    }

    /// The modules of all experts that have factors.
    fn all_modules(&self, layout: Layout) -> impl Iterator<Item = Module> {
        (0..self.experts).flat_map(move |expert| self.modules(layout, expert))
    }

    /// Takes over the ranks of the metadata, if they are those of the factors: a tool may have changed the tensors.
    fn set_blocks(&mut self, layout: Layout, ranks: &ExpertRanks) {
        let Some(ranks) = ranks.get(&layout.module(self.module)).filter(|_| self.is_of_experts()) else { return };
        let of = |projection: &&str| ranks.get(*projection).cloned().unwrap_or(Ranks::All(0));
        let blocks: Vec<Ranks> = layout.projections(self.name).iter().map(of).collect();
        let counted = |ranks: &Ranks| {
            matches!(ranks, Ranks::All(_)) || matches!(ranks, Ranks::Each(r) if r.len() == self.experts)
        };
        let sum = blocks.iter().map(Ranks::max).try_fold(0usize, usize::checked_add);
        self.blocks = (blocks.iter().all(counted) && sum == Some(self.rank)).then_some(blocks);
    }

    /// A regular expression for the names of these projections of all experts; with `any_layer`, those of other layers,
    /// too.
    fn pattern(&self, layout: Layout, projections: &[&str], any_layer: bool) -> String {
        let module = layout.module(self.module);
        let digits = |part: &str| any_layer && part.bytes().all(|b| b.is_ascii_digit());
        let parts = module.split('.').map(|part| match digits(part) {
            true => "[0-9]+".to_owned(),
            false => regex::escape(part),
        });
        let module = parts.collect::<Vec<_>>().join(r"\.");
        match self.is_of_experts() {
            true => format!(r"^{module}\.[0-9]+\.(?:{})", projections.join("|")),
            false => format!("^{module}"),
        }
    }
}

/// Expands the factors of `target_parameters`; `None` if the configuration has none. Without a layout, it is derived
/// from what the configuration says about the base.
///
/// # Errors
/// Returns the problem of a parameter that is of another kind or contradicts the tensors.
pub(crate) fn expand(
    file: &SafetensorsFile,
    config: &AdapterConfig,
    layout: Option<Layout>,
) -> Result<Option<Expanded>, AdapterProblem> {
    if config.peft_type != "LORA" || !config.holds(KEY) {
        return Ok(None);
    }
    let entries = entries(config)?;
    let ranks: ExpertRanks =
        file.metadata().get(RANKS).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let written = ranks.keys().next().and_then(|experts| Layout::of_module(experts));
    let Some(layout) = layout.or(written).or_else(|| Layout::of_base(config)) else {
        return Err(refused(&entries[0], "the base stores its experts transposed"));
    };
    let mut parameters = parameters(file, config, &entries)?;
    parameters.iter_mut().for_each(|parameter| parameter.set_blocks(layout, &ranks));
    let fused: BTreeSet<&str> = parameters.iter().flat_map(|p| &p.factors).map(|(name, _)| name.as_str()).collect();
    let mut tensors = BTreeMap::new();
    for name in file.names().into_iter().filter(|name| !fused.contains(name)) {
        let Some(info) = file.info(name) else { continue };
        tensors.insert(name.to_owned(), Part { info: info.clone(), source: name.to_owned(), place: Place::Whole });
    }
    for parameter in &parameters {
        for (name, part) in parts(parameter, layout) {
            if tensors.insert(name, part).is_some() {
                return Err(refused(&parameter.full(), "the adapter also has factors of the same modules"));
            }
        }
    }
    let witness = parameters.iter().flat_map(|p| p.names(layout, 0).into_iter().zip(p.names(layout.other(), 0)));
    let witness = witness.filter(|(own, other)| own != other).map(|(own, _)| own).next();
    let fused = parameters.iter().filter(|p| p.is_of_experts());
    let experts = fused.map(|p| (layout.module(p.module), p.experts)).collect();
    let config = expanded_config(config, &entries, &parameters, layout, &tensors);
    Ok(Some(Expanded { config, layout, witness, experts, tensors }))
}

fn refused(parameter: &str, reason: &'static str) -> AdapterProblem {
    AdapterProblem::TargetParameter { parameter: parameter.to_owned(), reason }
}

/// Returns the entries of `target_parameters`, all of which name parameters that can be expanded.
fn entries(config: &AdapterConfig) -> Result<Vec<String>, AdapterProblem> {
    let value = &config.other[KEY];
    let Ok(entries) = serde_json::from_value::<Vec<String>>(value.clone()) else {
        return Err(refused(&value.to_string(), "it is not a list of names"));
    };
    for entry in &entries {
        let (module, name) = entry.rsplit_once('.').unwrap_or(("", entry));
        let experts = ["", "experts"].contains(&module) || is_experts(module);
        if !(name == WEIGHT || OF_EXPERTS.contains(&name) && experts) {
            return Err(refused(entry, "it is another parameter"));
        }
    }
    Ok(entries)
}

/// Whether a module, or the end of a module's name, is that of fused experts.
fn is_experts(module: &str) -> bool {
    module == "mlp.experts" || module.ends_with(".mlp.experts")
}

/// PEFT's rule: an entry is the whole name, or its end after a dot.
fn matches(entry: &str, name: &str) -> bool {
    name.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Finds the factors of all parameters in the file.
fn parameters<'a>(
    file: &'a SafetensorsFile,
    config: &AdapterConfig,
    entries: &[String],
) -> Result<Vec<Parameter<'a>>, AdapterProblem> {
    let [a_suffix, b_suffix] = LayerKind::Linear.suffixes();
    let mut depths: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    for name in file.names() {
        let Some(full) = name.strip_suffix(a_suffix).and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let module = full.trim_end_matches(INNER);
        depths.entry(module).or_default().insert((full.len() - module.len()) / INNER.len());
    }
    let mut found = Vec::new();
    for (module, depths) in &depths {
        let named = |name: &&&str| entries.iter().any(|entry| matches(entry, &format!("{module}.{name}")));
        let names: Vec<&'static str> = OF_EXPERTS.iter().chain(&[WEIGHT]).filter(named).copied().collect();
        let Some(last) = names.last() else { continue };
        if !depths.iter().copied().eq(0..names.len()) || names.len() > 1 && names.contains(&WEIGHT) {
            let reason = "the nested factors of its module do not correspond to the parameters of target_parameters";
            return Err(refused(&format!("{module}.{last}"), reason));
        }
        for (depth, name) in names.iter().rev().enumerate() {
            found.push(parameter(file, config, module, name, depth, [a_suffix, b_suffix])?);
        }
    }
    for entry in entries {
        if !found.iter().any(|parameter| matches(entry, &parameter.full())) {
            return Err(refused(entry, "adapter_model.safetensors has no factors of it"));
        }
    }
    check_widths(&found)?;
    Ok(found)
}

fn parameter<'a>(
    file: &'a SafetensorsFile,
    config: &AdapterConfig,
    module: &'a str,
    name: &'static str,
    depth: usize,
    suffixes: [&str; 2],
) -> Result<Parameter<'a>, AdapterProblem> {
    let full = format!("{module}.{name}");
    if name != WEIGHT && !is_experts(module) {
        return Err(refused(&full, "it is another parameter"));
    }
    let factor = |suffix: &str| format!("{PREFIX}{module}{}{suffix}", INNER.repeat(depth));
    let [a_name, b_name] = suffixes.map(factor);
    let (Some(a), Some(b)) = (file.info(&a_name), file.info(&b_name)) else {
        return Err(AdapterProblem::NoCounterpart { tensor: a_name });
    };
    let rank = config.rank(&full);
    let shapes = || (a.shape.clone(), b.shape.clone());
    let wrong = || {
        let (a, b) = shapes();
        AdapterProblem::TargetParameterShape { parameter: full.clone(), rank, a, b }
    };
    let ([rows, _], [out, columns]) = (a.shape.as_slice(), b.shape.as_slice()) else { return Err(wrong()) };
    let experts = rows / rank;
    let halves = name != OF_EXPERTS[0] || out % 2 == 0;
    if experts == 0 || rows % rank != 0 || rows != columns || !halves || name == WEIGHT && experts != 1 {
        return Err(wrong());
    }
    if [a, b].iter().any(|info| info.dtype.bitsize() % 8 != 0) {
        return Err(refused(&full, "its factors have elements of less than a byte"));
    }
    Ok(Parameter { module, name, rank, experts, factors: [(a_name, a), (b_name, b)], blocks: None })
}

/// Checks that the two projections of every module's experts fit together, as they do in the supported families.
fn check_widths(parameters: &[Parameter<'_>]) -> Result<(), AdapterProblem> {
    for down in parameters.iter().filter(|p| p.name == OF_EXPERTS[1]) {
        let of_module = |p: &&Parameter<'_>| p.module == down.module && p.name == OF_EXPERTS[0];
        let Some(up) = parameters.iter().find(of_module) else { continue };
        let widths = |p: &Parameter<'_>| (p.factors[0].1.shape[1], p.factors[1].1.shape[0]);
        let ((up_in, up_out), (down_in, down_out)) = (widths(up), widths(down));
        if up.experts != down.experts || up_out != 2 * down_in || up_in != down_out {
            return Err(refused(&down.full(), "its shape does not fit to that of gate_up_proj"));
        }
    }
    Ok(())
}

/// The factors of the modules that a parameter consists of.
fn parts(parameter: &Parameter<'_>, layout: Layout) -> Vec<(String, Part)> {
    let [(a_name, a), (b_name, b)] = &parameter.factors;
    let (rank, experts) = (parameter.rank, parameter.experts);
    let (width, out) = (a.shape[1], b.shape[0]);
    let rows = out / parameter.names(layout, 0).len();
    let row = width * a.dtype.bitsize() / 8;
    let mut parts = Vec::new();
    for expert in 0..experts {
        for module in parameter.modules(layout, expert) {
            let name = module.name;
            let [a_new, b_new] = LayerKind::Linear.suffixes().map(|suffix| format!("{PREFIX}{name}{suffix}"));
            let info = TensorInfo { dtype: a.dtype, shape: vec![module.rank, width] };
            let first = expert * rank + module.first;
            let place = Place::Range(first * row..(first + module.rank) * row);
            parts.push((a_new, Part { info, source: a_name.clone(), place }));
            let info = TensorInfo { dtype: b.dtype, shape: vec![rows, module.rank] };
            let place = Place::Columns {
                rows: module.projection * rows..(module.projection + 1) * rows,
                of: rank * experts,
                first: module.first * experts + expert,
                step: experts,
                count: module.rank,
                bytes: OnceLock::new(),
            };
            parts.push((b_new, Part { info, source: b_name.clone(), place }));
        }
    }
    parts
}

/// Replaces the parameters by modules.
fn expanded_config(
    config: &AdapterConfig,
    entries: &[String],
    parameters: &[Parameter<'_>],
    layout: Layout,
    tensors: &BTreeMap<String, Part>,
) -> AdapterConfig {
    let mut new = config.clone();
    new.other.remove(KEY);
    let modules: Vec<String> = tensors.keys().filter_map(|name| module_of(name)).collect();
    // Keys that were written for parameters in blocks match no module.
    let rest = |key: &ModulePattern| {
        let of_blocks = parameters.iter().any(|p| p.blocks.is_some() && key.is_match(&p.full()));
        !of_blocks || modules.iter().any(|module| key.is_match(module))
    };
    new.rank_pattern.retain(|(key, _)| rest(key));
    new.alpha_pattern.retain(|(key, _)| rest(key));
    let alpha = |parameter: &Parameter<'_>, rank: usize| match parameter.blocks {
        None => config.alpha(&parameter.full()),
        Some(_) => {
            let alpha = alpha_for(config.scaling(&parameter.full()), rank, config.use_rslora);
            if nearly(alpha, config.lora_alpha) { config.lora_alpha } else { alpha }
        }
    };
    new.rank_pattern = patterns(new.rank_pattern, config.r, parameters, layout, |_, rank| rank);
    new.alpha_pattern = patterns(new.alpha_pattern, config.lora_alpha, parameters, layout, alpha);
    let mut targets = BTreeSet::new();
    for (entry, parameter) in entries.iter().flat_map(|entry| parameters.iter().map(move |p| (entry, p))) {
        if matches(entry, &parameter.full()) {
            targets.extend(parameter.all_modules(layout).map(|module| shortened(&module.name, parameter, entry)));
        }
    }
    new.target_modules = Some(TargetModules::List(match &config.target_modules {
        Some(TargetModules::List(list)) => {
            list.iter().cloned().chain(targets.into_iter().filter(|target| !list.contains(target))).collect()
        }
        None => targets.into_iter().collect(),
        // A regular expression cannot be extended by names.
        Some(TargetModules::Pattern(_)) => modules,
    }));
    new
}

/// The module of which a tensor is the factor A.
fn module_of(name: &str) -> Option<String> {
    let [a, b] = [LayerKind::Linear, LayerKind::Embedding].map(|kind| kind.suffixes()[0]);
    let module = name.strip_suffix(a).or(name.strip_suffix(b))?;
    Some(module.strip_prefix(PREFIX)?.to_owned())
}

/// The end of an expanded module's name that corresponds to an entry, so that the entry's modules stay the same.
fn shortened(module: &str, parameter: &Parameter<'_>, entry: &str) -> String {
    let full = parameter.full();
    let own = if parameter.is_of_experts() { "mlp.experts" } else { "mlp.gate" };
    let start = full.len() - entry.len();
    let layer = parameter.module.strip_suffix(own).map_or(start, str::len);
    let start = match () {
        // The layer's name is the same in all layouts.
        () if start <= layer && start < parameter.module.len() => start,
        () if parameter.is_of_experts() => module.rfind("experts.").unwrap_or(0),
        () => module.rfind('.').map_or(0, |dot| dot + 1),
    };
    module[start..].to_owned()
}

/// Returns a pattern's pairs, preceded by pairs for the expanded modules if they need any: its keys are written for
/// parameters. `value` returns the value of a parameter's module with a rank.
fn patterns<V: Copy + PartialEq>(
    pairs: Vec<(ModulePattern, V)>,
    default: V,
    parameters: &[Parameter<'_>],
    layout: Layout,
    value: impl Fn(&Parameter<'_>, usize) -> V,
) -> Vec<(ModulePattern, V)> {
    let now = |module: &str| pairs.iter().find(|(key, _)| key.is_match(module)).map_or(default, |(_, value)| *value);
    let right = |p: &Parameter<'_>| p.all_modules(layout).all(|module| now(&module.name) == value(p, module.rank));
    if parameters.iter().all(right) {
        return pairs;
    }
    let mut new: Vec<(ModulePattern, V)> = Vec::new();
    // For each key that matches the modules of all layers, the keys and values of single layers.
    let mut groups: BTreeMap<String, Vec<(String, V)>> = BTreeMap::new();
    for parameter in parameters {
        let with_value = |module: Module| (value(parameter, module.rank), module);
        let modules: Vec<(V, Module)> = parameter.all_modules(layout).map(with_value).collect();
        let projections = layout.projections(parameter.name);
        let of = |projection: Option<usize>| {
            let mut values = modules.iter().filter(|(_, m)| projection.is_none_or(|p| m.projection == p)).map(|m| m.0);
            let first = values.next();
            first.filter(|first| values.all(|value| value == *first))
        };
        let mut add = |projections: &[&str], value: V| {
            let key = |any_layer: bool| parameter.pattern(layout, projections, any_layer);
            groups.entry(key(parameter.is_of_experts())).or_default().push((key(false), value));
        };
        if let Some(value) = of(None) {
            add(projections, value);
            continue;
        }
        for (i, projection) in projections.iter().enumerate() {
            match of(Some(i)) {
                Some(value) => add(&[projection], value),
                None => {
                    let modules = modules.iter().filter(|(_, module)| module.projection == i);
                    new.extend(
                        modules.map(|(value, module)| (format!("^{}", regex::escape(&module.name)).into(), *value)),
                    );
                }
            }
        }
    }
    for (key, group) in groups {
        let first = group[0].1;
        if group.iter().all(|(_, value)| *value == first) {
            new.push((key.into(), first));
        } else {
            new.extend(group.into_iter().map(|(key, value)| (key.into(), value)));
        }
    }
    new.extend(pairs);
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Adapter, Dtype, TensorSpec, write_safetensors};

    const M: &str = "base_model.model.model.layers.0.mlp.experts";

    /// Writes an adapter whose elements are bytes, and opens it.
    fn open(dir: &Path, config: &str, tensors: &[(String, [usize; 2], &[u8])]) -> Adapter {
        let spec = |name: &String, shape: &[usize; 2]| TensorSpec {
            name: name.clone(),
            dtype: Dtype::U8,
            shape: shape.to_vec(),
        };
        let specs: Vec<TensorSpec> = tensors.iter().map(|(name, shape, _)| spec(name, shape)).collect();
        let path = dir.join("adapter_model.safetensors");
        let _ = std::fs::remove_file(&path);
        write_safetensors(&path, &specs, |i| tensors[i].2.to_vec()).unwrap();
        std::fs::write(dir.join("adapter_config.json"), config).unwrap();
        Adapter::open(dir).unwrap()
    }

    /// Two experts of rank 2, hidden size 2, intermediate size 1.
    fn both(dir: &Path, base: &str) -> Adapter {
        let config = format!(
            r#"{{"r":2,"lora_alpha":6,"base_model_name_or_path":"{base}",
                "target_modules":[],"target_parameters":["mlp.experts.gate_up_proj","experts.down_proj"]}}"#
        );
        let tensors: [(String, [usize; 2], &[u8]); 4] = [
            (format!("{M}.base_layer.lora_A.weight"), [4, 2], &[0, 1, 2, 3, 4, 5, 6, 7]),
            (format!("{M}.base_layer.lora_B.weight"), [2, 4], &[10, 11, 12, 13, 20, 21, 22, 23]),
            (format!("{M}.lora_A.weight"), [4, 1], &[30, 31, 32, 33]),
            (format!("{M}.lora_B.weight"), [2, 4], &[40, 41, 42, 43, 50, 51, 52, 53]),
        ];
        open(dir, &config, &tensors)
    }

    #[test]
    fn rows_of_a_and_columns_of_b_belong_to_experts() {
        let folder = tempfile::tempdir().unwrap();
        let adapter = both(folder.path(), "Qwen/Qwen3-30B-A3B");
        let of = |name: &str| {
            let name = format!("{M}.{name}.weight");
            (adapter.info(&name).unwrap().shape.clone(), adapter.bytes(&name).unwrap().to_vec())
        };
        // Expert e has the rows 2e and 2e + 1 of A, and the columns e and 2 + e of B.
        for (name, shape, bytes) in [
            ("0.gate_proj.lora_A", [2, 2], vec![0, 1, 2, 3]),
            ("0.up_proj.lora_A", [2, 2], vec![0, 1, 2, 3]),
            ("1.gate_proj.lora_A", [2, 2], vec![4, 5, 6, 7]),
            ("0.gate_proj.lora_B", [1, 2], vec![10, 12]),
            ("0.up_proj.lora_B", [1, 2], vec![20, 22]),
            ("1.gate_proj.lora_B", [1, 2], vec![11, 13]),
            ("1.up_proj.lora_B", [1, 2], vec![21, 23]),
            ("0.down_proj.lora_A", [2, 1], vec![30, 31]),
            ("1.down_proj.lora_A", [2, 1], vec![32, 33]),
            ("0.down_proj.lora_B", [2, 2], vec![40, 42, 50, 52]),
            ("1.down_proj.lora_B", [2, 2], vec![41, 43, 51, 53]),
        ] {
            assert_eq!(of(name), (shape.to_vec(), bytes), "{name}");
        }
        assert_eq!((adapter.names().len(), adapter.modules().len()), (12, 6), "the fused tensors are hidden");
        assert!(adapter.bytes(&format!("{M}.lora_A.weight")).is_err() && adapter.whole_tensors().is_empty());
        let module = "model.layers.0.mlp.experts.1.up_proj";
        assert_eq!((adapter.config().rank(module), adapter.config().scaling(module)), (2, 3.0));
        let targets = ["0.down_proj", "0.gate_proj", "0.up_proj", "1.down_proj", "1.gate_proj", "1.up_proj"];
        let prefixes = ["", "mlp.", "mlp.", "", "mlp.", "mlp."];
        let mut targets: Vec<String> =
            targets.iter().zip(prefixes).map(|(t, prefix)| format!("{prefix}experts.{t}")).collect();
        targets.sort();
        assert_eq!(adapter.config().target_modules, Some(TargetModules::List(targets)));
        assert!(!adapter.config().other.contains_key(KEY) && adapter.check_built().is_ok());
    }

    #[test]
    fn names_are_those_of_the_base() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let first = |adapter: &Adapter| adapter.modules()[0].name.clone();
        let (mixtral, mlp) = ("model.layers.0.block_sparse_moe.experts.0.w1", "model.layers.0.mlp.experts.0.down_proj");
        assert_eq!(first(&both(dir, "mistralai/Mixtral-8x7B-v0.1")), mixtral);
        let unknown = both(dir, "someone/model");
        assert_eq!(first(&unknown), mlp);
        let named = unknown.named_for(&|name| name.contains(".block_sparse_moe.")).unwrap();
        assert_eq!(first(&named), mixtral);
        let b = |module: &str| format!("base_model.model.{module}.lora_B.weight");
        let up = "model.layers.0.block_sparse_moe.experts.1.w3";
        assert_eq!(named.bytes(&b(up)).unwrap(), [21, 23], "w3 is the up projection");
        let back = named.named_for(&|name| name.contains(".mlp.experts.")).unwrap();
        assert_eq!((first(&back), back.config()), (mlp.to_owned(), unknown.config()));
        assert!(unknown.named_for(&|name| name.contains(".mlp.experts.")).is_none(), "they are right already");
        assert!(unknown.named_for(&|_| false).is_none(), "another base");
        // A directory says what it is, whatever its name.
        let base = dir.join("mixtral-like");
        std::fs::create_dir(&base).unwrap();
        let base_name = base.to_str().unwrap().replace('\\', "/");
        for (model_type, expected) in [("qwen3_moe", mlp), ("mixtral", mixtral)] {
            std::fs::write(base.join("config.json"), format!(r#"{{"model_type":"{model_type}"}}"#)).unwrap();
            assert_eq!(first(&both(dir, &base_name)), expected);
        }
    }

    #[test]
    fn patterns_of_parameters_become_those_of_modules() {
        let folder = tempfile::tempdir().unwrap();
        let layer = |layer: usize| format!("base_model.model.model.layers.{layer}.mlp.experts");
        // Layer 1 has another alpha; `down_proj` matches no parameter here.
        let config = r#"{"r":8,"lora_alpha":4,"target_modules":"all-linear","target_parameters":["gate_up_proj"],
            "rank_pattern":{"experts.gate_up_proj":1,"down_proj":5},
            "alpha_pattern":{"layers.1.mlp.experts.gate_up_proj":7,"gate_proj":9}}"#;
        let tensors: Vec<(String, [usize; 2], &[u8])> = (0..2)
            .flat_map(|l| ["A", "B"].map(|factor| (format!("{}.lora_{factor}.weight", layer(l)), [2, 2], &[0; 4][..])))
            .collect();
        let adapter = open(folder.path(), config, &tensors);
        let config = adapter.config();
        let module = |layer: usize, name: &str| format!("model.layers.{layer}.mlp.experts.1.{name}");
        assert_eq!(
            config.rank_pattern[0],
            (r"^model\.layers\.[0-9]+\.mlp\.experts\.[0-9]+\.(?:gate_proj|up_proj)".into(), 1)
        );
        for name in ["gate_proj", "up_proj"] {
            assert_eq!([0, 1].map(|l| config.scaling(&module(l, name))), [4.0, 7.0], "{name}");
        }
        assert_eq!(config.rank("model.layers.0.mlp.down_proj"), 5, "other modules keep their patterns");
        let Some(TargetModules::List(targets)) = &config.target_modules else { panic!("a list") };
        assert_eq!(targets.len(), 8);
        assert!(targets.contains(&module(1, "up_proj")), "a pattern is replaced by full names");
    }
}
