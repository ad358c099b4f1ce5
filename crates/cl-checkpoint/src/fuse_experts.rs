//! Writes adapters of experts with PEFT's `target_parameters`, the reverse of `fused_experts.rs`.
//!
//! An adapter of a mixture of experts has factors for every expert's linear layers. When PEFT 0.21 loads such an adapter
//! into a model of Transformers 5, whose experts are fused, it converts it (`peft/utils/transformers_weight_conversion.py`),
//! but correctly only for Mixtral, and only if all projections of all experts have the rank and the scaling of the
//! configuration, without rsLoRA and dropout. Other factors are ignored or scaled wrongly, without an error. Such
//! adapters are therefore written as PEFT itself would write them for the fused model.
//!
//! For a parameter that consists of projections with updates `s_p·B_p·A_p` of rank `r_p`, the factors are blocks of rank
//! `R = Σ r_p`, with one scaling `s`:
//!
//! ```text
//! A = [A_gate; A_up]    B = [B_gate, 0; 0, B_up]    α = s·R, or s·√R with rsLoRA
//! ```
//!
//! A `B_p` with another scaling is multiplied by `s_p / s`. Missing projections and experts, and ranks below the largest
//! of the experts, are filled with zeros in both factors. The ranks are noted in the file's metadata, so that reading
//! returns the same modules with the same factors.
//!
//! PEFT's conversion applies to any module whose name ends like that of an expert's projection or of a router, for
//! example in a shared expert. They are written as parameters of two dimensions, `mlp.shared_expert.up_proj.weight`,
//! which have the names and shapes of ordinary factors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::adapter::{LayerKind, PREFIX};
use crate::adapter_config::alpha_for;
use crate::convert::{from_f32, to_f32};
use crate::fused_experts::{ExpertRanks, INNER, KEY, Layout, OF_EXPERTS, RANKS, Ranks, WEIGHT};
use crate::{AdapterConfig, Dtype, ModulePattern, TargetModules, TensorSpec};

/// The modules of experts of a base model, such as `model.layers.0.mlp.experts` or
/// `model.layers.0.block_sparse_moe.experts`, with their numbers of experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseExperts(BTreeMap<String, usize>);

impl BaseExperts {
    /// Finds the experts among the names of a model's modules. The names of other modules are ignored.
    ///
    /// ```
    /// use cl_checkpoint::BaseExperts;
    /// let modules = ["model.layers.0.mlp.gate", "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj"];
    /// let experts = BaseExperts::of(modules);
    /// assert_eq!(experts, [("model.layers.0.mlp.experts".to_owned(), 2)].into_iter().collect());
    /// ```
    pub fn of<'a>(modules: impl IntoIterator<Item = &'a str>) -> BaseExperts {
        modules.into_iter().filter_map(place).map(|(experts, expert)| (experts.to_owned(), expert + 1)).collect()
    }

    /// Whether the model has none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the experts of another part of the same model.
    pub fn extend(&mut self, other: &BaseExperts) {
        for (experts, &count) in &other.0 {
            self.insert(experts.clone(), count);
        }
    }

    fn insert(&mut self, experts: String, count: usize) {
        let own = self.0.entry(experts).or_default();
        *own = count.max(*own);
    }
}

/// Collects modules of experts with their numbers of experts; the largest number of a module applies.
impl FromIterator<(String, usize)> for BaseExperts {
    fn from_iter<I: IntoIterator<Item = (String, usize)>>(modules: I) -> BaseExperts {
        let mut experts = BaseExperts::default();
        modules.into_iter().for_each(|(module, count)| experts.insert(module, count));
        experts
    }
}

/// The module of experts that a linear layer belongs to, and the number of its expert.
fn place(module: &str) -> Option<(&str, usize)> {
    let (rest, projection) = module.rsplit_once('.')?;
    let (experts, expert) = rest.rsplit_once('.')?;
    let layout = Layout::of_module(experts)?;
    let known = OF_EXPERTS.iter().any(|parameter| layout.projections(parameter).contains(&projection));
    // Numbers of experts are sizes of tensors below.
    let expert = expert.parse().ok().filter(|&expert: &usize| known && expert < 1 << 16)?;
    Some((experts, expert))
}

/// An adapter in PEFT's format for fused experts.
pub(crate) struct Fused<'t> {
    pub(crate) config: AdapterConfig,
    pub(crate) tensors: Vec<(TensorSpec, Cow<'t, [u8]>)>,
    /// The metadata of the file.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// The factors of a linear layer.
#[derive(Clone, Copy)]
struct Module<'t> {
    rank: usize,
    /// Input and output size.
    sizes: [usize; 2],
    scaling: f64,
    dtype: Dtype,
    bytes: [&'t [u8]; 2],
}

/// The factors of all experts for one parameter, by projection and expert.
type Projections<'t> = Vec<BTreeMap<usize, Module<'t>>>;

/// A parameter of the fused model.
struct Parameter {
    name: String,
    rank: usize,
    alpha: f64,
}

/// Returns the adapter with fused experts; `None` if it does not need them, or if PEFT cannot apply it to fused experts
/// at all: with DoRA, `lora_bias`, or experts of different shapes or dtypes.
pub(crate) fn fuse<'t>(
    config: &AdapterConfig,
    tensors: &'t [(TensorSpec, Vec<u8>)],
    base: &BaseExperts,
) -> Option<Fused<'t>> {
    let modules = linear_modules(config, tensors);
    let mut base = base.clone();
    base.extend(&BaseExperts::of(modules.keys().copied()));
    let layout = Layout::of_module(base.0.keys().next()?)?;
    let converted: BTreeSet<&str> = modules.keys().copied().filter(|module| is_converted(layout, module)).collect();
    let cannot = config.use_dora || config.fan_in_fan_out || config.other.get("lora_bias") == Some(&Value::Bool(true));
    if cannot || !needs(config, layout, &modules, &converted, &base) {
        return None;
    }
    let (mut parameters, mut fused, mut ranks) = (Vec::new(), Vec::new(), ExpertRanks::new());
    for (experts, &count) in &base.0 {
        let layout = Layout::of_module(experts)?;
        let of_projection = |projection: &&str| -> BTreeMap<usize, Module<'t>> {
            let name = |expert: usize| format!("{experts}.{expert}.{projection}");
            (0..count).filter_map(|expert| Some((expert, *modules.get(name(expert).as_str())?))).collect()
        };
        let of = OF_EXPERTS.map(|name| (name, layout.projections(name).iter().map(of_projection).collect()));
        let mut present: Vec<(&str, Projections<'t>)> = of.into();
        present.retain(|(_, projections)| projections.iter().any(|experts| !experts.is_empty()));
        let levels = present.len();
        for (i, (name, projections)) in present.into_iter().enumerate() {
            let module = layout.fused_module(experts);
            let (parameter, factors) = blocks(config, format!("{module}.{name}"), &projections, count)?;
            // PEFT nests the parameters of a module; the last one is outermost.
            let inner = INNER.repeat(levels - 1 - i);
            for (suffix, (dtype, shape, bytes)) in LayerKind::Linear.suffixes().iter().zip(factors) {
                let name = format!("{PREFIX}{module}{inner}{suffix}");
                fused.push((TensorSpec { name, dtype, shape: shape.to_vec() }, Cow::Owned(bytes)));
            }
            parameters.push(parameter);
            let of = ranks.entry(experts.clone()).or_default();
            for (projection, experts) in layout.projections(name).iter().zip(&projections) {
                of.insert((*projection).to_owned(), noted(experts, count));
            }
        }
    }
    for &module in converted.iter().filter(|module| place(module).is_none()) {
        let name = format!("{}.{WEIGHT}", layout.fused_module(module));
        let (rank, scaling) = (modules[module].rank, modules[module].scaling);
        parameters.push(Parameter { name, rank, alpha: alpha_for(scaling, rank, config.use_rslora) });
    }
    let kept = tensors.iter().filter(|(spec, _)| factor(&spec.name).is_none_or(|(module, _)| place(module).is_none()));
    fused.extend(kept.map(|(spec, bytes)| {
        let renamed = factor(&spec.name).map(|(module, suffix)| {
            let name = format!("{PREFIX}{}{suffix}", layout.fused_module(module));
            TensorSpec { name, ..spec.clone() }
        });
        (renamed.unwrap_or_else(|| spec.clone()), Cow::Borrowed(bytes.as_slice()))
    }));
    let rest = modules.keys().copied().filter(|module| !converted.contains(module)).collect::<Vec<_>>();
    let config = configuration(config, layout, &base, &parameters, &rest);
    let metadata = [(RANKS.to_owned(), serde_json::to_string(&ranks).ok()?)].into();
    Some(Fused { config, tensors: fused, metadata })
}

/// The module and the suffix of a linear layer's factor.
fn factor(tensor: &str) -> Option<(&str, &'static str)> {
    let name = tensor.strip_prefix(PREFIX)?;
    LayerKind::Linear.suffixes().into_iter().find_map(|suffix| Some((name.strip_suffix(suffix)?, suffix)))
}

/// Finds the factors of all linear layers, whose shapes agree with each other and with the configuration.
fn linear_modules<'t>(config: &AdapterConfig, tensors: &'t [(TensorSpec, Vec<u8>)]) -> BTreeMap<&'t str, Module<'t>> {
    let by_name: BTreeMap<&str, &(TensorSpec, Vec<u8>)> = tensors.iter().map(|t| (t.0.name.as_str(), t)).collect();
    let [a_suffix, b_suffix] = LayerKind::Linear.suffixes();
    let module = |a: &'t (TensorSpec, Vec<u8>)| {
        let (module, _) = factor(&a.0.name).filter(|(_, suffix)| *suffix == a_suffix)?;
        let b = by_name.get(format!("{PREFIX}{module}{b_suffix}").as_str())?;
        let ([rank, width], [out, _]) = (a.0.shape.as_slice(), b.0.shape.as_slice()) else { return None };
        let (sizes, bytes) = ([*width, *out], [a.1.as_slice(), b.1.as_slice()]);
        Some((module, Module { rank: *rank, sizes, scaling: config.scaling(module), dtype: a.0.dtype, bytes }))
    };
    tensors.iter().filter_map(module).collect()
}

/// Whether PEFT's conversion replaces a module by a parameter.
fn is_converted(layout: Layout, module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    last == "gate" || OF_EXPERTS.iter().any(|parameter| layout.projections(parameter).contains(&last))
}

/// Whether PEFT's conversion of the modules would change their effect.
fn needs(
    config: &AdapterConfig,
    layout: Layout,
    modules: &BTreeMap<&str, Module<'_>>,
    converted: &BTreeSet<&str>,
    base: &BaseExperts,
) -> bool {
    let scaling = AdapterConfig { rank_pattern: Vec::new(), alpha_pattern: Vec::new(), ..config.clone() }.scaling("");
    let same = |module: &&str| modules[*module].rank == config.r && modules[*module].scaling == scaling;
    if !converted.iter().all(same) || config.lora_dropout != 0.0 {
        return !converted.is_empty();
    }
    let projections: Vec<&&str> = converted.iter().filter(|module| !module.ends_with(".gate")).collect();
    let all = 3 * base.0.values().sum::<usize>();
    let complete = projections.len() == all && projections.iter().all(|module| place(module).is_some());
    !(projections.is_empty() || complete && layout == Layout::Mixtral && !config.use_rslora)
}

/// Returns a parameter with its factors A and B: dtype, shape and bytes. `None` if experts have different shapes or
/// dtypes.
#[allow(clippy::type_complexity)]
fn blocks(
    config: &AdapterConfig,
    name: String,
    projections: &Projections<'_>,
    experts: usize,
) -> Option<(Parameter, [(Dtype, [usize; 2], Vec<u8>); 2])> {
    let all = || projections.iter().flat_map(BTreeMap::values);
    let first = all().next()?;
    // The two projections of a parameter have the same shape.
    if all().any(|module| (module.sizes, module.dtype) != (first.sizes, first.dtype)) {
        return None;
    }
    let size = match first.dtype.bitsize() {
        bits if bits % 8 == 0 => bits / 8,
        _ => return None,
    };
    // That of the first projection, or, if it does not change the weight, of the next one.
    let scaling = all().map(|module| module.scaling).find(|scaling| *scaling != 0.0).unwrap_or_default();
    let largest = |experts: &BTreeMap<usize, Module<'_>>| experts.values().map(|m| m.rank).max().unwrap_or(0);
    let rank: usize = projections.iter().map(largest).sum();
    let [width, rows] = first.sizes;
    let (row, columns, out) = (width * size, rank * experts, rows * projections.len());
    let (mut a, mut b) = (vec![0; columns * row], vec![0; out * columns * size]);
    let mut start = 0;
    for (projection, of_experts) in projections.iter().enumerate() {
        for (&expert, module) in of_experts {
            let first_row = expert * rank + start;
            a[first_row * row..][..module.rank * row].copy_from_slice(module.bytes[0]);
            let own = scaled(module, if module.scaling == scaling { 1.0 } else { module.scaling / scaling })?;
            for (i, element) in own.chunks_exact(size).enumerate() {
                let (line, k) = (projection * rows + i / module.rank, start + i % module.rank);
                b[(line * columns + k * experts + expert) * size..][..size].copy_from_slice(element);
            }
        }
        start += largest(of_experts);
    }
    let alpha = alpha_for(scaling, rank, config.use_rslora);
    let factors = [(first.dtype, [columns, width], a), (first.dtype, [out, columns], b)];
    Some((Parameter { name, rank, alpha }, factors))
}

/// Returns the bytes of B, multiplied by a number and rounded to its dtype.
fn scaled<'t>(module: &Module<'t>, by: f64) -> Option<Cow<'t, [u8]>> {
    let bytes = module.bytes[1];
    if by == 1.0 {
        return Some(Cow::Borrowed(bytes));
    }
    let values: Vec<f32> = to_f32(module.dtype, bytes)?.into_iter().map(|v| (f64::from(v) * by) as f32).collect();
    from_f32(module.dtype, &values).map(Cow::Owned)
}

/// The ranks of one projection, as noted in the metadata.
fn noted(modules: &BTreeMap<usize, Module<'_>>, experts: usize) -> Ranks {
    let ranks: Vec<usize> = (0..experts).map(|expert| modules.get(&expert).map_or(0, |m| m.rank)).collect();
    match ranks.first() {
        Some(&first) if ranks.iter().all(|&rank| rank == first) => Ranks::All(first),
        _ => Ranks::Each(ranks),
    }
}

/// Replaces modules by parameters; `rest` are the names of the modules that stay.
fn configuration(
    config: &AdapterConfig,
    layout: Layout,
    base: &BaseExperts,
    parameters: &[Parameter],
    rest: &[&str],
) -> AdapterConfig {
    let mut new = config.clone();
    // PEFT has no dropout for parameters, and refuses to load an adapter with it.
    new.lora_dropout = 0.0;
    new.target_modules = Some(TargetModules::List(match &config.target_modules {
        Some(TargetModules::List(list)) => list.iter().filter(|name| !is_converted(layout, name)).cloned().collect(),
        _ => rest.iter().map(|&name| name.to_owned()).collect(),
    }));
    let stays = |key: &ModulePattern| rest.iter().any(|module| key.is_match(module));
    new.rank_pattern.retain(|(key, _)| stays(key));
    new.alpha_pattern.retain(|(key, _)| stays(key));
    let groups = groups(base, parameters);
    let entries: Vec<&str> = groups
        .iter()
        .flat_map(|(entry, members)| match entry {
            Some(entry) => vec![entry.as_str()],
            None => members.iter().map(|parameter| parameter.name.as_str()).collect(),
        })
        .collect();
    new.other.insert(KEY.to_owned(), entries.into());
    new.rank_pattern = patterns(new.rank_pattern, config.r, &groups, |parameter| parameter.rank);
    new.alpha_pattern = patterns(new.alpha_pattern, config.lora_alpha, &groups, |parameter| parameter.alpha);
    new
}

/// Groups the parameters that one entry of `target_parameters` can name: those of all experts of the base. Other
/// parameters are named in full.
fn groups<'p>(base: &BaseExperts, parameters: &'p [Parameter]) -> Vec<(Option<String>, Vec<&'p Parameter>)> {
    let mut groups = Vec::new();
    let mut rest: Vec<&Parameter> = parameters.iter().collect();
    for name in OF_EXPERTS {
        let entry = format!("mlp.experts.{name}");
        let (members, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|p| p.name.ends_with(&entry));
        let all = members.len() == base.0.len();
        groups.push((all.then_some(entry), members));
        rest = others;
    }
    groups.push((None, rest));
    groups
}

/// Returns a pattern's pairs, preceded by those of the parameters for which they give another value.
fn patterns<V: Copy + PartialEq>(
    pairs: Vec<(ModulePattern, V)>,
    default: V,
    groups: &[(Option<String>, Vec<&Parameter>)],
    value: impl Fn(&Parameter) -> V,
) -> Vec<(ModulePattern, V)> {
    let right = |parameter: &&&Parameter| {
        let found = pairs.iter().find(|(key, _)| key.is_match(&parameter.name));
        found.map_or(default, |(_, value)| *value) == value(parameter)
    };
    let mut new = Vec::new();
    for (entry, members) in groups {
        let wrong: Vec<&&Parameter> = members.iter().filter(|parameter| !right(parameter)).collect();
        let Some(first) = wrong.first().map(|parameter| value(parameter)) else { continue };
        match entry {
            Some(entry) if members.iter().all(|parameter| value(parameter) == first) => {
                new.push((entry.as_str().into(), first))
            }
            _ => new.extend(wrong.iter().map(|p| (format!("^{}", regex::escape(&p.name)).into(), value(p)))),
        }
    }
    new.extend(pairs);
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Adapter, Manifest, TensorSource, write_adapter_with_files};

    type Tensors = Vec<(TensorSpec, Vec<u8>)>;

    /// Factors of a module with small values. Down projections have the sizes of the others in reverse, as in a model.
    fn factors(module: &str, rank: usize) -> Tensors {
        let [a, b] = LayerKind::Linear.suffixes().map(|suffix| format!("{PREFIX}{module}{suffix}"));
        let seed = module.bytes().map(usize::from).sum::<usize>();
        let tensor = |name: String, shape: [usize; 2]| {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| ((seed + 5 * i) % 17 + 1) as f32 / 8.0).collect();
            let spec = TensorSpec { name, dtype: Dtype::F32, shape: shape.to_vec() };
            (spec, from_f32(Dtype::F32, &values).unwrap())
        };
        let [width, out] = if module.ends_with("down_proj") || module.ends_with("w2") { [4, 2] } else { [2, 4] };
        vec![tensor(a, [rank, width]), tensor(b, [out, rank])]
    }

    /// Writes factors of these modules, and returns the configuration as written and the adapter as it is read.
    fn written(
        config: &AdapterConfig,
        modules: &[(&str, usize)],
        base: &BaseExperts,
    ) -> (AdapterConfig, Tensors, Adapter) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("adapter");
        let tensors: Tensors = modules.iter().flat_map(|(module, rank)| factors(module, *rank)).collect();
        write_adapter_with_files(&dir, config, &tensors, &[], base, Manifest::new("adapter"), false).unwrap();
        let text = std::fs::read(dir.join("adapter_config.json")).unwrap();
        let adapter = Adapter::open(&dir).unwrap();
        assert_eq!(adapter.modules().len(), modules.len());
        for (spec, _) in &tensors {
            assert_eq!(adapter.info(&spec.name).map(|info| &info.shape), Some(&spec.shape), "{}", spec.name);
            // Files of an open adapter may be removed only after they have been read.
            adapter.bytes(&spec.name).unwrap();
        }
        (serde_json::from_slice(&text).unwrap(), tensors, adapter)
    }

    fn targets(modules: &[(&str, usize)]) -> Option<TargetModules> {
        Some(TargetModules::List(modules.iter().map(|(module, _)| (*module).to_owned()).collect()))
    }

    fn base(experts: &str) -> BaseExperts {
        (0..2).map(|layer| (format!("model.layers.{layer}.{experts}"), 2)).collect()
    }

    const ATTENTION: &str = "model.layers.0.self_attn.q_proj";

    #[test]
    fn equal_ranks_are_read_as_they_were_written() {
        for (experts, gate, projections) in [
            ("mlp.experts", "mlp.gate", ["gate_proj", "up_proj", "down_proj"]),
            ("block_sparse_moe.experts", "block_sparse_moe.gate", ["w1", "w3", "w2"]),
        ] {
            let all = (0..2).flat_map(|layer| (0..2).map(move |expert| (layer, expert)));
            let names = all.flat_map(|(layer, expert)| {
                projections.map(|projection| format!("model.layers.{layer}.{experts}.{expert}.{projection}"))
            });
            let shared = "model.layers.0.mlp.shared_expert.up_proj".to_owned();
            let names: Vec<String> =
                // One module is missing, so that Mixtral's are fused without rsLoRA, too.
                names.skip(1).chain([ATTENTION.to_owned(), format!("model.layers.1.{gate}"), shared]).collect();
            let modules: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 3)).collect();
            for (lora_alpha, use_rslora) in [(6.0, true), (5.0, false), (0.7, true)] {
                let target_modules = targets(&modules);
                let config = AdapterConfig { r: 3, lora_alpha, use_rslora, target_modules, ..AdapterConfig::default() };
                let (stored, tensors, adapter) = written(&config, &modules, &base(experts));
                let parameters = &stored.other[KEY];
                assert_eq!(parameters[0], "mlp.experts.gate_up_proj");
                assert!(parameters.as_array().unwrap().len() >= 3, "{parameters}");
                assert!(tensors.iter().all(|(spec, bytes)| adapter.bytes(&spec.name).unwrap() == bytes));
                let read = adapter.config();
                assert_eq!((&read.rank_pattern, &read.alpha_pattern), (&Vec::new(), &Vec::new()));
                assert_eq!((read.r, read.lora_alpha, read.use_rslora), (3, lora_alpha, use_rslora));
                assert_eq!(adapter.experts(), base(experts), "whatever the base is called");
            }
        }
    }

    /// One rank and scaling per parameter have to do for any ranks and scalings of its modules.
    #[test]
    fn other_ranks_scalings_and_missing_modules_keep_their_updates() {
        const M: &str = "model.layers.1.mlp.experts";
        let name = |expert: usize, projection: &str| format!("{M}.{expert}.{projection}");
        let cases: [&[(String, usize)]; 4] = [
            &[(name(1, "gate_proj"), 2)],
            &[(name(0, "down_proj"), 1), (name(1, "down_proj"), 4)],
            &[(name(0, "up_proj"), 4), (name(1, "gate_proj"), 2), (name(1, "down_proj"), 8)],
            &[(name(0, "gate_proj"), 1), (name(0, "up_proj"), 2), (name(1, "gate_proj"), 4), (name(1, "up_proj"), 2)],
        ];
        for case in cases {
            let modules: Vec<(&str, usize)> = case.iter().map(|(name, rank)| (name.as_str(), *rank)).collect();
            let mut config = AdapterConfig { r: 2, target_modules: targets(&modules), ..AdapterConfig::default() };
            config.rank_pattern = modules.iter().map(|(name, rank)| ((*name).into(), *rank)).collect();
            config.alpha_pattern = vec![(name(1, "gate_proj").into(), 16.0)];
            let (stored, tensors, adapter) = written(&config, &modules, &base("mlp.experts"));
            assert!(stored.other[KEY][0].as_str().unwrap().starts_with(M), "named in full: {:?}", stored.other);
            for (spec, bytes) in &tensors {
                let (module, suffix) = factor(&spec.name).unwrap();
                let read = adapter.config();
                assert_eq!(read.rank(module), config.rank(module));
                let scaling = |config: &AdapterConfig| match suffix == LayerKind::Linear.suffixes()[1] {
                    true => config.scaling(module) as f32,
                    false => 1.0,
                };
                let [old, new] =
                    [bytes.as_slice(), adapter.bytes(&spec.name).unwrap()].map(|b| to_f32(Dtype::F32, b).unwrap());
                for (old, new) in old.iter().zip(new) {
                    // The scalings are powers of two here, so that nothing is rounded.
                    assert_eq!(old * scaling(&config), new * scaling(read), "{}", spec.name);
                }
            }
        }
    }

    #[test]
    fn adapters_that_peft_reads_right_or_not_at_all_stay_as_they_are() {
        let experts: Vec<String> = (0..2)
            .flat_map(|e| ["w1", "w2", "w3"].map(|p| format!("model.layers.0.block_sparse_moe.experts.{e}.{p}")))
            .collect();
        let modules: Vec<(&str, usize)> = experts.iter().map(|name| (name.as_str(), 2)).collect();
        let one: BaseExperts = [("model.layers.0.block_sparse_moe.experts".to_owned(), 2)].into_iter().collect();
        let config = AdapterConfig { r: 2, target_modules: targets(&modules), ..AdapterConfig::default() };
        let fused = |config: &AdapterConfig, modules: &[(&str, usize)], base: &BaseExperts| {
            let tensors: Tensors = modules.iter().flat_map(|(module, rank)| factors(module, *rank)).collect();
            fuse(config, &tensors, base).is_some()
        };
        assert!(!fused(&config, &modules, &one));
        assert!(!fused(&config, &[(ATTENTION, 2)], &one), "no experts");
        assert!(!fused(&config, &[(ATTENTION, 2)], &BaseExperts::default()));
        assert!(fused(&config, &modules[1..], &one), "a projection is missing");
        assert!(fused(&config, &modules, &base("block_sparse_moe.experts")), "a layer is missing");
        assert!(fused(&AdapterConfig { use_rslora: true, ..config.clone() }, &modules, &one));
        assert!(fused(&AdapterConfig { lora_dropout: 0.1, ..config.clone() }, &modules, &one), "PEFT refuses dropout");
        assert!(fused(&AdapterConfig { alpha_pattern: vec![("w1".into(), 3.0)], ..config.clone() }, &modules, &one));
        let zero = AdapterConfig { alpha_pattern: vec![("0.w1".into(), 0.0)], ..config.clone() };
        let (_, _, adapter) = written(&zero, &modules, &one);
        let finite =
            |name: &&str| to_f32(Dtype::F32, adapter.bytes(name).unwrap()).unwrap().iter().all(|v| v.is_finite());
        assert!(adapter.names().iter().all(finite), "nothing is divided by a scaling of zero");
        let dora = AdapterConfig { use_dora: true, use_rslora: true, ..config.clone() };
        assert!(!fused(&dora, &modules, &one), "PEFT has no format for it");
        let mut bias = config.clone();
        bias.other.insert("lora_bias".to_owned(), true.into());
        assert!(!fused(&bias, &modules[1..], &one), "PEFT has no format for it");
    }
}
