//! Plans the inputs and outputs of a mixture of adapters, and collects all problems.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cl_checkpoint::{
    Adapter, AdapterModule, BesideKind, Checkpoint, Dtype, Interrupt, LayerKind, TensorSource, TensorSpec, convert,
};

use cl_merge::adapter::{ExtractOptions, extract};
use tempfile::TempDir;

use crate::plan::note;
use crate::problem::MOST_EXPERTS;
use crate::problem::{BlendProblem, CountProblem};
use crate::{
    BlendConfig, BlendExpert, BlendInit, Error, FloatType, ModelInfo, ModuleExperts, Problem, mixture_tensors,
};

/// A validated plan of a mixture of adapters, made without reading factors.
pub struct BlendPlan {
    pub(crate) config: BlendConfig,
    pub(crate) base: Checkpoint,
    pub(crate) base_hash: String,
    /// The experts, followed by the adapters of general knowledge.
    pub(crate) adapters: Vec<Adapter>,
    pub(crate) modules: Vec<BlendModule>,
    /// Temporary directories of adapters that were extracted from models.
    _extracted: Vec<TempDir>,
    /// Notes for the user that are not problems.
    pub notes: Vec<String>,
}

/// A module that at least one expert changes.
pub(crate) struct BlendModule {
    pub(crate) name: String,
    pub(crate) input: usize,
    pub(crate) output: usize,
    /// Dtype of the stacked factors.
    pub(crate) dtype: Dtype,
    /// Each adapter's update of the module, if it has one.
    parts: Vec<Option<BlendPart>>,
    /// Number of leading entries of `parts` that are experts.
    experts: usize,
}

/// The update of a module by one adapter.
#[derive(Clone)]
pub(crate) struct BlendPart {
    pub(crate) module: AdapterModule,
    pub(crate) scaling: f64,
}

impl BlendPlan {
    /// Opens the base and all adapters and checks that they can form a mixture. With `ignore_base`, adapters whose
    /// manifests name another base are accepted.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] with all problems at once.
    pub fn new(config: &BlendConfig, ignore_base: bool) -> Result<BlendPlan, Error> {
        BlendPlan::interruptible(config, ignore_base, &Interrupt::default())
    }

    /// Like [`BlendPlan::new`]; a stop request ends the extraction of adapters from models.
    ///
    /// # Errors
    /// Returns the errors of [`BlendPlan::new`], and [`Error::Interrupted`].
    pub fn interruptible(config: &BlendConfig, ignore_base: bool, interrupt: &Interrupt) -> Result<BlendPlan, Error> {
        let (mut problems, mut extracted) = (Vec::new(), Vec::new());
        let base = note(Checkpoint::open(&config.base_model), "base_model", &mut problems);
        let mut opened: Vec<Option<Adapter>> = (0..)
            .zip(&config.experts)
            .map(|(i, e)| {
                let base = base.as_ref().map(Checkpoint::dir);
                open_expert(base, e, &place(config, i), interrupt, &mut extracted, &mut problems)
            })
            .collect();
        if interrupt.requested() {
            return Err(Error::Interrupted);
        }
        let general = (config.experts.len()..).zip(&config.general_adapters);
        opened.extend(general.map(|(i, dir)| note(Adapter::open(dir), &place(config, i), &mut problems)));
        if let Some(base) = &base {
            // Adapters of fused experts do not contain the base's names.
            for adapter in opened.iter_mut().flatten() {
                if let Some(named) = adapter.named_in(base) {
                    *adapter = named;
                }
            }
        }
        check_counts(config, &mut problems);
        check_temperature(config, &mut problems);
        for (i, adapter) in opened.iter().enumerate().filter_map(|(i, a)| Some((i, a.as_ref()?))) {
            check_kind(adapter, base.as_ref(), &place_of(config, i, adapter), &mut problems);
        }
        let base_hash = base.as_ref().and_then(|b| note(b.content_hash(), "base_model", &mut problems));
        if let Some((base, hash)) = base.as_ref().zip(base_hash.as_ref()) {
            for (i, adapter) in opened.iter().enumerate().filter_map(|(i, a)| Some((i, a.as_ref()?))) {
                let place = place_of(config, i, adapter);
                check_fits(base, adapter, &place, &mut problems);
                check_base_hash(hash, adapter, ignore_base, &place, &mut problems);
            }
        }
        let adapters: Option<Vec<Adapter>> = opened.into_iter().collect();
        match (base, base_hash, adapters) {
            (Some(base), Some(base_hash), Some(adapters)) if problems.is_empty() => {
                let modules = modules(config, &adapters);
                let notes = notes(config, &adapters, &modules);
                let config = config.clone();
                Ok(BlendPlan { config, base, base_hash, adapters, modules, _extracted: extracted, notes })
            }
            _ => Err(Error::Problems(problems)),
        }
    }

    /// Checks the output path, as [`blend`](crate::blend) does first.
    ///
    /// # Errors
    /// Returns an error if the output exists and `overwrite` is not set, if it lies inside a directory that is read, or
    /// if it cannot be created.
    pub fn check_output(&self, out: &Path, overwrite: bool) -> Result<(), Error> {
        self.config.check_output(out, overwrite)
    }

    /// The tensors that will be written, ordered by module.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.modules.iter().flat_map(|module| module.specs(&self.config)).collect()
    }

    /// Number of bytes of tensors that will be written.
    pub fn bytes_written(&self) -> u64 {
        let bytes = |t: &TensorSpec| t.shape.iter().product::<usize>() * t.dtype.bitsize() / 8;
        self.tensors().iter().map(|t| bytes(t) as u64).sum()
    }

    /// Parameter counts by purpose; the base is the stem.
    pub fn info(&self) -> ModelInfo {
        let stem = self.base.names().iter().filter_map(|n| self.base.info(n)).map(|i| i.elements() as u64).sum();
        let mut experts = vec![0; self.config.experts.len()];
        for module in &self.modules {
            let ranks = module.experts().ranks;
            let sizes = ranks.iter().map(|rank| (rank * (module.input + module.output)) as u64);
            experts.iter_mut().zip(sizes).for_each(|(sum, size)| *sum += size);
        }
        let routers = match self.config.router.init {
            BlendInit::Spectr => 0,
            _ => self.modules.iter().map(|m| (m.experts * m.input) as u64).sum(),
        };
        ModelInfo::of_adapters(stem, &experts, routers, self.config.top_k())
    }

    /// A one-line summary of the mixture.
    pub fn summary(&self) -> String {
        let ranks: usize = self.modules.iter().map(|m| m.experts().total_rank()).max().unwrap_or(0);
        format!(
            "{} experts at {} modules, {} for each token, ranks of up to {ranks} in all",
            self.config.experts.len(),
            self.modules.len(),
            self.config.top_k()
        )
    }
}

impl BlendModule {
    /// Ranks and scalings, as in `mixture_config.json`.
    pub(crate) fn experts(&self) -> ModuleExperts {
        let of = |expert: usize| {
            let summands = self.summands(expert);
            let rank: usize = summands.iter().map(|summand| summand.part.module.rank()).sum();
            (rank, summands.first().map_or(0.0, |summand| summand.scaling))
        };
        let (ranks, scalings) = (0..self.experts).map(of).unzip();
        ModuleExperts { ranks, scalings }
    }

    /// The low-rank updates whose sum is an expert's update: its own, minus the mean of those of general knowledge.
    pub(crate) fn summands(&self, expert: usize) -> Vec<Summand<'_>> {
        let (own, general) = (self.parts[expert].as_ref(), &self.parts[self.experts..]);
        let scaling = match own {
            // If the scaling is 0, other scalings cannot be divided by it.
            Some(part) if part.scaling != 0.0 || general.is_empty() => part.scaling,
            _ => 1.0,
        };
        let summand = |adapter, part, factor| Summand { adapter, part, scaling, factor };
        let own = own.map(|part| summand(expert, part, if part.scaling == scaling { 1.0 } else { 0.0 }));
        let count = general.len() as f64;
        let general = (self.experts..).zip(general).filter_map(|(adapter, part)| Some((adapter, part.as_ref()?)));
        own.into_iter()
            .chain(general.map(|(adapter, part)| summand(adapter, part, -part.scaling / count / scaling)))
            .collect()
    }

    /// Number of experts.
    pub(crate) fn expert_count(&self) -> usize {
        self.experts
    }

    /// Specs of A, B, and the router, if there is one.
    pub(crate) fn specs(&self, config: &BlendConfig) -> Vec<TensorSpec> {
        let (rank, experts) = (self.experts().total_rank(), self.experts);
        let [a, b, router] = mixture_tensors(&self.name);
        let mut specs = vec![
            TensorSpec { name: a, dtype: self.dtype, shape: vec![rank, self.input] },
            TensorSpec { name: b, dtype: self.dtype, shape: vec![self.output, rank] },
        ];
        if config.router.init != BlendInit::Spectr {
            specs.push(TensorSpec { name: router, dtype: Dtype::F32, shape: vec![experts, self.input] });
        }
        specs
    }
}

/// One of the updates whose sum is an expert's update.
pub(crate) struct Summand<'p> {
    /// Index of the adapter.
    pub(crate) adapter: usize,
    pub(crate) part: &'p BlendPart,
    /// Scaling of the whole sum.
    scaling: f64,
    /// Factor of this update in the sum, before the sum's scaling.
    pub(crate) factor: f64,
}

/// Name of the configuration key of an adapter.
fn place(config: &BlendConfig, index: usize) -> String {
    match index.checked_sub(config.experts.len()) {
        None => format!("experts[{index}]"),
        Some(general) => format!("general_adapters[{general}]"),
    }
}

fn place_of(config: &BlendConfig, index: usize, adapter: &Adapter) -> String {
    let named = config.experts.get(index).map_or(adapter.dir(), BlendExpert::source);
    format!("{} ({})", place(config, index), named.display())
}

/// Opens an adapter, or extracts one from a model.
fn open_expert(
    base: Option<&Path>,
    expert: &BlendExpert,
    place: &str,
    interrupt: &Interrupt,
    extracted: &mut Vec<TempDir>,
    problems: &mut Vec<Problem>,
) -> Option<Adapter> {
    match (&expert.adapter, &expert.model, expert.rank) {
        (Some(adapter), None, None) => note(Adapter::open(adapter), place, problems),
        (None, Some(model), Some(rank)) => {
            let base = base?;
            let options = ExtractOptions { rank, interrupt: interrupt.clone(), ..ExtractOptions::default() };
            let dir =
                tempfile::tempdir().map_err(|source| cl_checkpoint::Error::Io { path: std::env::temp_dir(), source });
            let dir = note(dir, place, problems)?;
            let out = dir.path().join("adapter");
            let report = extract(base, model, &out, &options).map_err(BlendProblem::Extract);
            note(report, place, problems)?;
            extracted.push(dir);
            note(Adapter::open(&out), place, problems)
        }
        _ => {
            problems.push(Problem::new(place, BlendProblem::Source));
            None
        }
    }
}

fn check_temperature(config: &BlendConfig, problems: &mut Vec<Problem>) {
    let Some(temperature) = config.router.temperature else { return };
    let mut add = |problem: BlendProblem| problems.push(Problem::new("router.temperature", problem));
    if config.router.init != BlendInit::Arrow {
        add(BlendProblem::UnusedTemperature);
    } else if !(temperature.is_finite() && temperature > 0.0) {
        add(BlendProblem::Temperature { temperature });
    }
}

fn check_counts(config: &BlendConfig, problems: &mut Vec<Problem>) {
    let (experts, k) = (config.experts.len(), config.top_k());
    let mut add = |place: &str, problem: CountProblem| problems.push(Problem::new(place, problem));
    if experts == 0 || experts > MOST_EXPERTS {
        add("experts", CountProblem::Experts { experts, most: MOST_EXPERTS });
    } else if k == 0 || k > experts {
        add("num_experts_per_tok", CountProblem::Chosen { chosen: k, experts });
    }
}

/// Rejects adapters that are more than low-rank updates of the decoder's linear layers.
fn check_kind(adapter: &Adapter, base: Option<&Checkpoint>, place: &str, problems: &mut Vec<Problem>) {
    if let Err(error) = adapter.check_built() {
        problems.push(Problem::new(place, error));
        return;
    }
    let mut add = |problem: BlendProblem| problems.push(Problem::new(place, problem));
    for module in adapter.modules() {
        let name = &module.name;
        if module.kind == LayerKind::Embedding {
            add(BlendProblem::Embedding { module: name.clone() });
        } else if is_head(name) {
            add(BlendProblem::Head { module: name.clone() });
        }
        let scaling = adapter.config().scaling(name);
        if !scaling.is_finite() {
            add(BlendProblem::Scaling { module: name.clone(), scaling });
        }
        for factor in module.factors() {
            let dtype = adapter.info(&factor).expect("checked when it was opened").dtype;
            if !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                add(BlendProblem::Dtype { tensor: factor, dtype });
            }
        }
    }
    if adapter.modules().iter().any(|module| module.dora) {
        add(BlendProblem::Dora);
    }
    match adapter.beside() {
        Err(error) => problems.push(Problem::new(place, error)),
        Ok(tensors) => {
            for beside in tensors {
                let copy = || base.is_none_or(|b| is_copy(adapter, &beside.name, b, &beside.tensor));
                if beside.kind != BesideKind::Untrained || !copy() {
                    add(BlendProblem::Beside { tensor: beside.name, kind: beside.kind });
                }
            }
        }
    }
}

fn is_head(module: &str) -> bool {
    module.rsplit('.').next() == Some("lm_head")
}

/// Whether a tensor of an adapter is a copy of the base's.
fn is_copy(adapter: &Adapter, name: &str, base: &Checkpoint, tensor: &str) -> bool {
    let values = |source: &dyn TensorSource, name: &str| {
        source.info(name).and_then(|info| convert::to_f32(info.dtype, source.bytes(name).ok()?))
    };
    let own = values(base, tensor)
        .or_else(|| values(base, "model.embed_tokens.weight").filter(|_| tensor == "lm_head.weight"));
    own.is_some_and(|own| values(adapter, name) == Some(own))
}

fn check_fits(base: &Checkpoint, adapter: &Adapter, place: &str, problems: &mut Vec<Problem>) {
    for module in adapter.modules().into_iter().filter(|m| m.kind == LayerKind::Linear && !is_head(&m.name)) {
        let (name, shape) = (&module.name, module.weight_shape());
        let module = name.clone();
        let problem = match base.info(&format!("{name}.weight")) {
            None => BlendProblem::NoModule { module },
            Some(info) if info.shape != shape => BlendProblem::Shape { module, shape, base: info.shape.clone() },
            Some(_) => continue,
        };
        problems.push(Problem::new(place, problem));
        return; // one is enough to show that they are for different bases
    }
}

fn check_base_hash(base: &str, adapter: &Adapter, ignore: bool, place: &str, problems: &mut Vec<Problem>) {
    let Some(other) = adapter.base_hash().filter(|other| other != base && !ignore) else { return };
    problems.push(Problem::new(place, BlendProblem::OtherBase { adapter: other, base: base.to_owned() }));
}

/// The union of all adapters' modules, by name.
fn modules(config: &BlendConfig, adapters: &[Adapter]) -> Vec<BlendModule> {
    let mut modules: BTreeMap<&str, Vec<Option<BlendPart>>> = BTreeMap::new();
    for (e, adapter) in adapters.iter().enumerate() {
        for module in adapter.modules() {
            let scaling = adapter.config().scaling(&module.name);
            let parts = modules.entry(&module.name).or_insert_with(|| vec![None; adapters.len()]);
            parts[e] = Some(BlendPart { module: module.clone(), scaling });
        }
    }
    let built = modules.into_iter().map(|(name, parts)| {
        let [output, input] = parts.iter().flatten().next().expect("some expert has it").module.weight_shape();
        // Computed factors are not rounded to the dtype in which the originals were stored.
        let computed = config.router.init == BlendInit::Spectr || !config.general_adapters.is_empty();
        let dtype = if computed { Dtype::F32 } else { common_dtype(adapters, &parts) };
        BlendModule { name: name.to_owned(), input, output, dtype, parts, experts: config.experts.len() }
    });
    built.collect()
}

/// The common dtype of all factors of a module, or f32 if they differ.
fn common_dtype(adapters: &[Adapter], parts: &[Option<BlendPart>]) -> Dtype {
    let of = |(adapter, part): (&Adapter, &Option<BlendPart>)| {
        let factors = part.as_ref().map(|p| p.module.factors()).into_iter().flatten();
        factors.filter_map(|name| Some(adapter.info(&name)?.dtype)).collect::<Vec<_>>()
    };
    let mut dtypes: Vec<Dtype> = adapters.iter().zip(parts).flat_map(of).collect();
    dtypes.dedup();
    match dtypes[..] {
        [one] if FloatType::of(one).is_some() => one,
        _ => Dtype::F32,
    }
}

fn notes(config: &BlendConfig, adapters: &[Adapter], modules: &[BlendModule]) -> Vec<String> {
    let mut notes = Vec::new();
    // Adapters that were extracted from models have the base's path.
    let is_given = |i: usize| config.experts.get(i).is_none_or(|expert| expert.adapter.is_some());
    let given = adapters.iter().enumerate().filter(|(i, _)| is_given(*i));
    let names: BTreeSet<&str> = given.filter_map(|(_, a)| a.config().base_model_name_or_path.as_deref()).collect();
    if names.len() > 1 {
        let names: Vec<&str> = names.into_iter().collect();
        notes.push(format!("adapters name different bases: {}", names.join(", ")));
    }
    let all = config.top_k() == config.experts.len();
    match config.router.init {
        BlendInit::Random => notes.push("router: random; train it, or gates follow chance".to_owned()),
        BlendInit::Uniform if !all => {
            notes.push("router: all logits are 0, so every token goes to the first experts".to_owned());
        }
        _ => {}
    }
    let partial = modules.iter().filter(|m| m.parts[..m.experts].iter().any(Option::is_none)).count();
    if partial > 0 {
        notes.push(format!("{partial} modules are not in every adapter; experts without the module add nothing there"));
    }
    notes
}
