//! Combination of several adapters into one.

use std::ops::Range;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Adapter, Checkpoint, LayerKind, Manifest, OutputDir, TensorSource, convert};
use rayon::prelude::*;
use serde_json::json;

use super::dense::{self, Dense};
use super::low_rank::{Leading, LowRank};
use super::merge::{self, Group, Method, Recipe, Resolved};
use super::options::{CombineOptions, Space};
use super::output::{self, About, NewModule, NewWhole};
use super::report::{CombineReport, ModuleReport, WholeReport};
use super::set::{Module, Set, Whole, base_tensor, open};
use super::threads::{on_threads, stop_if_asked};
use super::update::Update;
use super::whole::{self, Difference, View};
use super::{card, factors};
use crate::Error;
use crate::problem::{AdapterProblem, MemoryProblem, Place, Problem};
use crate::recipe::registry;
use crate::run::budget::{Budget, FIXED};

/// Combines adapters into one PEFT directory, written atomically.
///
/// `linear`, `cat` and `task_arithmetic` are sums of low-rank matrices and stay low-rank; with a rank, they are
/// truncated to the nearest matrix of that rank. Other methods work on the dense `ΔW` of one module at a time, as task
/// vectors on a base of zeros, and the result is truncated. Random masks depend on seed, module and adapter, as in
/// merges of models.
///
/// Modules, biases and token rows that adapters train in addition to their LoRA factors are combined by the same
/// method, as differences from the base, which is then required.
///
/// # Errors
/// Returns [`Error::Problems`] with all problems, and an error for non-finite values or if reading or writing fails.
pub fn combine(dirs: &[PathBuf], out: &Path, options: &CombineOptions) -> Result<CombineReport, Error> {
    let (dirs, options) = in_order(dirs, options);
    let adapters = open(&dirs)?;
    let mut problems = Vec::new();
    let mut set = Set::new(&adapters, &options.weights, &mut problems);
    set.rename(&options.names, &mut problems);
    let base = checked(&mut set, &options, &mut problems)?;
    let resolved = merge::resolve(&set, &options, &mut problems);
    let Some(mut resolved) = resolved.filter(|_| problems.is_empty()) else { return Err(Error::Problems(problems)) };
    let mut inputs: Vec<(&str, &Path)> = dirs.iter().map(|dir| ("an adapter", dir.as_path())).collect();
    inputs.extend(base.as_ref().map(|base| ("the base model", base.dir())));
    OutputDir::check(out, options.overwrite, &inputs)?;
    let combining = Combining { set: &set, options: &options, base: base.as_ref() };
    let (made, wholes) = on_threads(options.threads, || combining.all(&mut resolved))?;
    let (modules, reports): (Vec<_>, Vec<_>) = made.into_iter().unzip();
    let (wholes, whole): (Vec<NewWhole>, Vec<WholeReport>) = wholes.into_iter().unzip();
    let factors: usize = modules.iter().map(|m: &NewModule| m.factors.rank * (m.shape[0] + m.shape[1])).sum();
    let parameters = factors + whole.iter().map(|w| w.shape.iter().product::<usize>()).sum::<usize>();
    let about = about(&mut set, &options, &resolved, base.as_ref())?;
    adapters.iter().try_for_each(Adapter::check_unchanged)?;
    base.iter().try_for_each(Checkpoint::check_unchanged)?;
    output::write(out, modules, wholes, about, options.overwrite)?;
    Ok(CombineReport {
        method: resolved.method,
        space: options.space,
        adapters: set.members.iter().map(|m| m.name.clone()).collect(),
        total: total(&reports),
        modules: reports,
        whole,
        parameters,
        notes: set.notes,
    })
}

/// Sorts adapters by name, so that the result does not depend on their order, unless the method itself depends on it.
fn in_order(dirs: &[PathBuf], options: &CombineOptions) -> (Vec<PathBuf>, CombineOptions) {
    let mut options = options.clone();
    let ordered = registry::method(&options.method.replace('-', "_")).is_some_and(|m| m.ordered);
    let fits = |list: &[f64]| list.len() < 2 || list.len() == dirs.len();
    let named = options.names.len() == dirs.len();
    if ordered || !fits(&options.weights) || !fits(&options.density) || !(named || options.names.is_empty()) {
        return (dirs.to_vec(), options);
    }
    let at = |list: &[f64], i: usize| list.get(i).copied().unwrap_or(0.0);
    let mut order: Vec<usize> = (0..dirs.len()).collect();
    order.sort_by(|&i, &j| {
        let numbers = |list: &[f64]| at(list, i).total_cmp(&at(list, j));
        let by_name = if named { options.names[i].cmp(&options.names[j]) } else { dirs[i].cmp(&dirs[j]) };
        by_name.then(numbers(&options.weights)).then(numbers(&options.density))
    });
    let sorted = |list: &[f64]| if list.len() < 2 { list.to_vec() } else { order.iter().map(|&i| list[i]).collect() };
    (options.weights, options.density) = (sorted(&options.weights), sorted(&options.density));
    if named {
        options.names = order.iter().map(|&i| options.names[i].clone()).collect();
    }
    (order.into_iter().map(|i| dirs[i].clone()).collect(), options)
}

/// Opens the base and collects the problems.
fn checked(
    set: &mut Set<'_>,
    options: &CombineOptions,
    problems: &mut Vec<Problem>,
) -> Result<Option<Checkpoint>, Error> {
    if !options.ignore_base {
        set.check_bases(problems);
    }
    for member in set.members.iter().filter(|m| m.adapter.config().use_dora) {
        problems.push(Problem::new(Place::adapter(&member.name), AdapterProblem::DoraCombined));
    }
    let embedding = set.modules.iter().find(|m| m.kind == LayerKind::Embedding);
    if let (Some(module), Some(whole)) = (embedding, set.wholes.iter().find(|w| w.is_update())) {
        let kind = AdapterProblem::LoraBias { tensor: whole.tensor.clone(), module: module.name.clone() };
        problems.push(Problem::whole(kind));
    }
    if options.rank == Some(0) {
        problems.push(Problem::whole(AdapterProblem::RankZero));
    }
    let Some(dir) = &options.base else {
        set.check_alone(problems);
        return Ok(None);
    };
    match Checkpoint::open(dir) {
        Ok(base) => {
            set.check_against(&base, problems)?;
            problems.extend(set.wholes.iter().filter_map(|whole| grown(set, whole, &base)));
            if !options.ignore_base {
                set.check_base_hash(&base, problems)?;
            }
            Ok(Some(base))
        }
        Err(error) => {
            problems.push(Problem::unopened(dir, error));
            Ok(None)
        }
    }
}

/// Reports a table with more rows than the base's: other adapters have no known rows for the new tokens.
fn grown(set: &Set<'_>, whole: &Whole, base: &Checkpoint) -> Option<Problem> {
    let rows = whole.shape(set, Some(base)).first().copied()?;
    let own = base.info(&base_tensor(base, &whole.tensor))?.shape.first().copied()?;
    let name = &set.members[whole.parts[0].member].name;
    let kind = AdapterProblem::RowsBeyondBase { tensor: whole.tensor.clone(), rows, base_rows: own };
    (rows > own).then(|| Problem::new(Place::adapter(name), kind))
}

/// The inputs and settings of a combination.
struct Combining<'r> {
    set: &'r Set<'r>,
    options: &'r CombineOptions,
    base: Option<&'r Checkpoint>,
}

type Made = (NewModule, ModuleReport);
type MadeWhole = (NewWhole, WholeReport);

/// Number of elements per block of rows. It is constant, so that sums over blocks do not depend on the caller.
const ROWS_OF: usize = 1 << 17;

impl Combining<'_> {
    fn all(&self, resolved: &mut Resolved) -> Result<(Vec<Made>, Vec<MadeWhole>), Error> {
        match &mut resolved.recipe {
            Recipe::Dense(method) => self.dense(method),
            Recipe::Sum { factors } => {
                let views = self.views();
                self.check_whole_memory(&views, |_| 0)?;
                let sum = |module: &Module| self.sum(module, factors);
                let made = self.each(|_, module| self.sum_bytes(module), |_, module| sum(module))?;
                let sums = self.set.wholes.iter().zip(&views).map(|(whole, view)| {
                    stop_if_asked(&self.options.interrupt)?;
                    self.encode(whole, view, |rows, base| whole::weighted(self.set, whole, view, rows, factors, base))
                });
                Ok((made, sums.collect::<Result<_, _>>()?))
            }
            Recipe::Factors { method } => {
                let made = self.each(
                    |_, module| self.sum_bytes(module),
                    |_, module| factors::combine(self.set, module, method.as_ref(), self.options),
                )?;
                Ok((made, Vec::new()))
            }
        }
    }

    /// Returns the rows to combine of every tensor other than the factors.
    fn views(&self) -> Vec<View> {
        self.set.wholes.iter().map(|whole| whole.view(self.set, self.base, true)).collect()
    }

    /// Returns the base of a tensor other than the factors. Updates' own biases have none.
    fn base_of(&self, whole: &Whole) -> Option<&Checkpoint> {
        self.base.filter(|_| !whole.is_update())
    }

    /// Checks that the tensors other than the factors, which are computed last, fit into the memory limit.
    fn check_whole_memory(&self, views: &[View], workspace: impl Fn(usize) -> usize) -> Result<(), Error> {
        let written: usize = views.iter().map(|v| v.elements() * self.options.dtype.dtype().bitsize() / 8).sum();
        let needs = views.iter().enumerate().map(|(i, view)| 12 * view.elements() + workspace(i));
        let needed = FIXED + self.factor_bytes() + written + needs.max().unwrap_or(0);
        if views.is_empty() || needed <= self.options.memory {
            return Ok(());
        }
        Err(Problem::whole(MemoryProblem::BesideFactors { allowed: self.options.memory, needed }).into())
    }

    /// Computes, rounds and measures a tensor other than the factors; `merged` computes some of its rows from those of
    /// the base.
    fn encode(
        &self,
        whole: &Whole,
        view: &View,
        merged: impl Fn(Range<usize>, &[f64]) -> Result<Vec<f64>, Error> + Sync,
    ) -> Result<MadeWhole, Error> {
        let dtype = self.options.dtype.dtype();
        let length = (ROWS_OF / view.columns.max(1)).max(1);
        let block = |start: usize| -> Result<(Vec<u8>, f64), Error> {
            let rows = start..view.rows().min(start + length);
            let base = whole::base_rows(self.base_of(whole), &whole.tensor, view, rows.clone())?;
            let values = merged(rows, &base)?;
            let energy = values.iter().zip(&base).map(|(v, b)| (v - b) * (v - b)).sum();
            let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
            let bytes = convert::from_f32(dtype, &values).expect("f32, f16 or bf16");
            match convert::first_not_finite(dtype, &bytes) {
                None => Ok((bytes, energy)),
                Some((i, _)) => {
                    let (tensor, index) = (whole.tensor.clone(), start * view.columns + i);
                    Err(Error::Overflow { tensor, index, value: values[i], dtype })
                }
            }
        };
        let starts: Vec<usize> = (0..view.rows()).step_by(length).collect();
        let blocks: Vec<Result<(Vec<u8>, f64), Error>> = starts.into_par_iter().map(block).collect();
        let (mut bytes, mut energy) = (Vec::new(), 0.0);
        for block in blocks {
            let (more, of_block) = block?;
            bytes.extend(more);
            energy += of_block;
        }
        let new = NewWhole::new(self.set, whole, view, self.base, bytes);
        let report = WholeReport { tensor: whole.tensor.clone(), shape: new.shape.clone(), norm: energy.sqrt() };
        Ok((new, report))
    }

    /// Processes all modules within the memory limit, large ones first; returns the results in the order of modules.
    fn each(
        &self,
        bytes: impl Fn(usize, &Module) -> usize + Sync,
        make: impl Fn(usize, &Module) -> Result<Made, Error> + Sync,
    ) -> Result<Vec<Made>, Error> {
        let modules = &self.set.modules;
        let budget = self.budget(modules.iter().enumerate().map(|(i, m)| (bytes(i, m), m.name.as_str())))?;
        let mut jobs: Vec<usize> = (0..modules.len()).collect();
        jobs.sort_by_key(|&i| (std::cmp::Reverse(modules[i].elements()), i));
        let make = |&i: &usize| {
            let _room = budget.take(bytes(i, &modules[i]));
            (i, stop_if_asked(&self.options.interrupt).and_then(|()| make(i, &modules[i])))
        };
        let mut made: Vec<(usize, Result<Made, Error>)> = jobs.par_iter().with_max_len(1).map(make).collect();
        made.sort_by_key(|(i, _)| *i);
        made.into_iter().map(|(_, made)| made).collect()
    }

    /// Returns the memory that is left after the program, the updates' factors and the output.
    fn budget<'n>(&self, needs: impl Iterator<Item = (usize, &'n str)>) -> Result<Budget, Error> {
        let (most, module) = needs.max_by_key(|(bytes, _)| *bytes).unwrap_or((0, ""));
        let held = FIXED + self.factor_bytes();
        if held + most <= self.options.memory {
            return Ok(Budget::new(self.options.memory - held));
        }
        let (allowed, module) = (self.options.memory, module.to_owned());
        Err(Problem::whole(MemoryProblem::Modules { allowed, held, module, largest: most }).into())
    }

    /// Returns the size of all factors in bytes, read and written.
    fn factor_bytes(&self) -> usize {
        let factors = |m: &Module| m.total_rank() * (m.shape[0] + m.shape[1]);
        8 * self.set.modules.iter().map(factors).sum::<usize>()
    }

    /// Returns the memory for a sum in f64: concatenated factors, their decompositions, and the output.
    fn sum_bytes(&self, module: &Module) -> usize {
        8 * (6 * module.total_rank() * (module.shape[0] + module.shape[1]) + 8 * module.total_rank().pow(2))
    }

    fn sum(&self, module: &Module, factors: &[f64]) -> Result<Made, Error> {
        let updates = self.loaded(module, factors)?;
        let parts: Vec<(f64, &Update)> = updates.iter().map(|(factor, update)| (*factor, update)).collect();
        let sum = LowRank::sum(module.shape, &parts);
        match self.options.rank {
            Some(rank) if rank < sum.rank() => self.finish(module, sum.leading(rank, &module.name)?),
            _ => {
                let energy = sum.energy();
                self.finish(module, Leading { factors: sum, energy, lost: 0.0 })
            }
        }
    }

    /// Reads a module's updates with nonzero factors, together with their total factors, including the scaling.
    fn loaded(&self, module: &Module, factors: &[f64]) -> Result<Vec<(f64, Update)>, Error> {
        let parts = module.parts.iter().filter(|part| factors[part.member] != 0.0);
        parts.map(|part| Ok((factors[part.member] * part.scaling, self.set.load(part)?))).collect()
    }

    fn dense(&self, method: &mut Method) -> Result<(Vec<Made>, Vec<MadeWhole>), Error> {
        let (set, modules) = (self.set, &self.set.modules);
        let zeros: Vec<Update> = modules.iter().map(|m| Update::zero(m.shape)).collect();
        let updates: Vec<Result<Vec<Update>, Error>> = modules.par_iter().map(|m| self.updates(m)).collect();
        let updates: Vec<Vec<Update>> = updates.into_iter().collect::<Result<_, _>>()?;
        let names: Vec<String> = modules.iter().map(Module::tensor).collect();
        let views = self.views();
        let shapes: Vec<Vec<usize>> = set.wholes.iter().zip(&views).map(|(w, v)| self.shape(w, v)).collect();
        let wide: Vec<Update> = views.iter().map(|view| Update::zero([view.rows(), view.columns])).collect();
        let differences: Vec<Vec<Difference<'_>>> =
            set.wholes.iter().zip(&views).map(|(whole, view)| self.differences(whole, view)).collect();
        let mut groups: Vec<Group<'_>> =
            (0..modules.len()).map(|i| group(&names[i], &modules[i].shape, &updates[i], &zeros[i], false)).collect();
        for (i, whole) in set.wholes.iter().enumerate() {
            groups.push(group(&whole.tensor, &shapes[i], &differences[i], &wide[i], true));
        }
        let (of_modules, of_wholes) = groups.split_at(modules.len());
        self.check_whole_memory(&views, |i| method.workspace(&of_wholes[i]))?;
        method.prepare(&groups)?;
        let made = self.dense_modules(method, of_modules, &updates)?;
        let merged = of_wholes.iter().enumerate().map(|(i, group)| {
            stop_if_asked(&self.options.interrupt)?;
            let (whole, view) = (&set.wholes[i], &views[i]);
            let merged = method.merge(modules.len() + i, group, &[])?;
            self.encode(whole, view, |rows, base| {
                let merged = &merged[rows.start * view.columns..];
                Ok(base.iter().zip(merged).map(|(b, m)| b + f64::from(*m)).collect())
            })
        });
        Ok((made, merged.collect::<Result<_, _>>()?))
    }

    fn dense_modules(
        &self,
        method: &Method,
        groups: &[Group<'_>],
        updates: &[Vec<Update>],
    ) -> Result<Vec<Made>, Error> {
        let largest = self.set.modules.iter().flat_map(|m| &m.parts).map(|part| part.module.rank()).max().unwrap_or(1);
        let rank = self.options.rank.unwrap_or(largest);
        let threads = rayon::current_num_threads();
        let share = self.options.memory / (2 * threads);
        let whole = |module: &Module| method.dense_bytes(module) <= share;
        let bytes = |i: usize, module: &Module| {
            let entries = if whole(module) { method.dense_bytes(module) } else { 0 };
            entries + method.workspace(&groups[i]) + dense::scratch(module.shape, rank)
        };
        self.each(bytes, |i, module| {
            let kept: Vec<Vec<f32>> =
                if whole(module) { updates[i].iter().map(Update::dense).collect() } else { Vec::new() };
            let merged = method.merge(i, &groups[i], &kept)?;
            let cut = Dense { values: &merged, shape: module.shape }.leading(rank, &module.name)?;
            self.finish(module, cut)
        })
    }

    /// Returns the shape that methods see: selected token rows form a table of their own.
    fn shape(&self, whole: &Whole, view: &View) -> Vec<usize> {
        if whole.rows().is_some() { vec![view.rows(), view.columns] } else { whole.shape(self.set, self.base) }
    }

    /// Returns every member's difference from the base, which is zero for members that do not change it.
    fn differences<'d>(&'d self, whole: &Whole, view: &'d View) -> Vec<Difference<'d>> {
        let base = self.base_of(whole);
        (0..self.set.members.len()).map(|member| Difference::new(self.set, base, whole, view, member)).collect()
    }

    /// Returns every member's scaled update, which is zero for members without the module.
    fn updates(&self, module: &Module) -> Result<Vec<Update>, Error> {
        let update = |member: usize| match module.parts.iter().find(|part| part.member == member) {
            Some(part) => Ok(self.set.load(part)?.scaled(part.scaling)),
            None => Ok(Update::zero(module.shape)),
        };
        (0..self.set.members.len()).map(update).collect()
    }

    /// Rounds the factors and measures the error.
    fn finish(&self, module: &Module, mut cut: Leading) -> Result<Made, Error> {
        if cut.factors.rank() == 0 {
            cut.factors =
                LowRank { left: faer::Mat::zeros(module.shape[0], 1), right: faer::Mat::zeros(module.shape[1], 1) };
        }
        let factors = cut.factors.encode(&module.name, module.kind, self.options.dtype.dtype())?;
        let share = |part: f64, none: f64| if cut.energy > 0.0 { part / cut.energy } else { none };
        let report = ModuleReport {
            module: module.name.clone(),
            rank: factors.rank,
            norm: cut.energy.sqrt(),
            energy: share(cut.energy - cut.lost, 1.0),
            // The truncated part is orthogonal to the kept part, so squared norms add up.
            relative_error: share(cut.lost + factors.changed, 0.0).sqrt(),
        };
        Ok((NewModule { name: module.name.clone(), kind: module.kind, shape: module.shape, factors }, report))
    }
}

fn group<'g, S: TensorSource>(
    tensor: &'g str,
    shape: &'g [usize],
    updates: &'g [S],
    zero: &'g Update,
    parallel: bool,
) -> Group<'g> {
    let updates = updates.iter().map(|update| update as &dyn TensorSource).collect();
    Group { tensor, shape, updates, zero, parallel }
}

/// Aggregates the reports of all modules.
pub(super) fn total(modules: &[ModuleReport]) -> ModuleReport {
    let energy: f64 = modules.iter().map(|m| m.norm * m.norm).sum();
    let weighted = |f: fn(&ModuleReport) -> f64, none: f64| {
        let sum: f64 = modules.iter().map(|m| f(m) * m.norm * m.norm).sum();
        if energy > 0.0 { sum / energy } else { none }
    };
    ModuleReport {
        module: String::new(),
        rank: modules.iter().map(|m| m.rank).max().unwrap_or(0),
        norm: energy.sqrt(),
        energy: weighted(|m| m.energy, 1.0),
        relative_error: weighted(|m| m.relative_error * m.relative_error, 0.0).sqrt(),
    }
}

fn about(
    set: &mut Set<'_>,
    options: &CombineOptions,
    resolved: &Resolved,
    base: Option<&Checkpoint>,
) -> Result<About, Error> {
    let weights: Vec<f64> = set.members.iter().map(|m| m.weight).collect();
    let settings = json!({
        "method": resolved.method,
        "space": options.space,
        "profile": options.profile,
        "weights": weights,
        "density": options.density,
        "parameters": resolved.parameters,
        "rank": options.rank,
        "seed": options.seed,
        "dtype": options.dtype,
    });
    let mut manifest = Manifest::new("adapter").with_config(json!({ "combine": settings }));
    let mut bases: Vec<Option<String>> = set.members.iter().map(|m| m.adapter.base_hash()).collect();
    bases.dedup();
    let named = set.base_name();
    if let ([Some(hash)], Some(name)) = (&bases[..], &named) {
        manifest = manifest.with_source("base", Path::new(name), hash.clone());
    }
    let hashes: Vec<Result<String, cl_checkpoint::Error>> =
        set.members.par_iter().map(|m| m.adapter.content_hash()).collect();
    for (member, hash) in set.members.iter().zip(hashes) {
        manifest = manifest.with_source("adapter", member.adapter.dir(), hash?);
    }
    let task = |adapter: &Adapter| adapter.config().task_type.clone();
    let first = set.members.first().and_then(|m| task(&m.adapter));
    let same = set.members.iter().all(|m| task(&m.adapter) == first);
    let inputs: Vec<(String, String)> =
        set.members.iter().map(|m| (m.name.clone(), format!("weight {}", m.weight))).collect();
    let done = match options.space {
        Space::Delta => format!("Combined by `{}` of the updates `ΔW = s·B·A`.", resolved.method),
        Space::Factors => format!("Combined by `{}` of the factors A and B apart, as PEFT does.", resolved.method),
    };
    let text = serde_json::to_string_pretty(&settings).unwrap_or_default();
    Ok(About {
        card: card::card(named.as_deref(), "Combined adapter", &done, &inputs, &text),
        base_model: named,
        task_type: first.filter(|_| same),
        targets: output::targets(set, base),
        experts: output::experts(set, base),
        as_one: set.as_one,
        dtype: options.dtype.dtype(),
        manifest,
    })
}
