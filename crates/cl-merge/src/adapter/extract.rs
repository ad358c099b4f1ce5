//! Extraction of a low-rank adapter from the difference between a fine-tuned model and its base.

use std::path::Path;

use cl_checkpoint::{Checkpoint, HubSnapshot, Interrupt, LayerKind, Manifest, OutputDir, TensorSource, convert};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::card;
use super::combine::total;
use super::dense::{self, Dense};
use super::output::{self, About, NewModule, NewWhole};
use super::report::ModuleReport;
use super::set::{HEAD, tied_table};
use super::threads::{on_threads, stop_if_asked};
use crate::Error;
use crate::problem::{AdapterProblem, MemoryProblem, Place, Problem};
use crate::recipe::config::FloatType;
use crate::run::budget::{Budget, FIXED};
use crate::tensor::{READ, TensorGroup, Values, is_float, kernels};

/// Options for extracting an adapter.
#[derive(Clone, Debug)]
pub struct ExtractOptions {
    /// Maximum rank of each module.
    pub rank: usize,
    /// Modules by name or name suffix; if empty, all linear layers except the head.
    pub targets: Vec<String>,
    /// Modules that are stored in full if they differ, such as `norm` or `embed_tokens`: as in PEFT, all modules whose
    /// name ends with an entry. They get no factors.
    pub modules_to_save: Vec<String>,
    /// Dtype of the output.
    pub dtype: FloatType,
    /// Number of threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Memory limit in bytes.
    pub memory: usize,
    /// Whether to replace an existing output.
    pub overwrite: bool,
    /// Stop request.
    pub interrupt: Interrupt,
}

impl Default for ExtractOptions {
    /// Rank 8 of all linear layers in f32, with 1 GiB on all cores.
    fn default() -> Self {
        ExtractOptions {
            rank: 8,
            targets: Vec::new(),
            modules_to_save: Vec::new(),
            dtype: FloatType::Float32,
            threads: 0,
            memory: 1 << 30,
            overwrite: false,
            interrupt: Interrupt::default(),
        }
    }
}

/// A tensor that differs but is not part of the adapter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Untouched {
    /// Name of the tensor.
    pub tensor: String,
    /// Norm of the difference.
    pub norm: f64,
}

/// Report of an extraction.
#[derive(Clone, Debug, Serialize)]
pub struct ExtractReport {
    /// Modules by name.
    pub modules: Vec<ModuleReport>,
    /// All modules together; its rank is the largest.
    pub total: ModuleReport,
    /// Names of the tensors that are stored in full.
    pub saved: Vec<String>,
    /// Tensors that differ but are not part of the adapter.
    pub untouched: Vec<Untouched>,
    /// Number of elements in the factors and in the tensors that are stored in full.
    pub parameters: usize,
    /// Notes.
    pub notes: Vec<String>,
}

/// Writes an adapter with `B·A ≈ W_tuned − W_base` for every module, truncated to a rank by singular values, and the
/// tuned model's tensors of [`ExtractOptions::modules_to_save`].
///
/// # Errors
/// Returns [`Error::Problems`] if the models have different shapes or do not differ in the requested modules, and an
/// error for non-finite values or if reading or writing fails.
pub fn extract(base: &Path, tuned: &Path, out: &Path, options: &ExtractOptions) -> Result<ExtractReport, Error> {
    let (base, tuned) = (Checkpoint::open(base)?, Checkpoint::open(tuned)?);
    let mut problems = shape_problems(&base, &tuned);
    if options.rank == 0 {
        problems.push(Problem::whole(AdapterProblem::RankZero));
    }
    let saved = saved(&base, &options.modules_to_save, &mut problems);
    let mut modules = modules(&base, &options.targets, &mut problems);
    modules.retain(|module| !saved.iter().any(|tensor| module_of(tensor) == module.name));
    let pair = Pair { base: &base, tuned: &tuned, options, saved };
    problems.extend(pair.memory_problem(&modules));
    if !problems.is_empty() {
        return Err(Error::Problems(problems));
    }
    OutputDir::check(out, options.overwrite, &[("the base model", base.dir()), ("the tuned model", tuned.dir())])?;
    let make = || Ok((pair.extract(&modules)?, pair.whole()?, pair.untouched(&modules)?));
    let (made, wholes, untouched) = on_threads(options.threads, make)?;
    let (modules, reports): (Vec<_>, Vec<_>) = made.into_iter().flatten().unzip();
    if modules.is_empty() {
        let kind = AdapterProblem::NoDifference { base: base.dir().to_owned() };
        return Err(Problem::new(of_dir(&tuned), kind).into());
    }
    let factors: usize = modules.iter().map(|m: &NewModule| m.factors.rank * (m.shape[0] + m.shape[1])).sum();
    let parameters = factors + wholes.iter().map(|w| w.shape.iter().product::<usize>()).sum::<usize>();
    let mut notes = Vec::new();
    if !untouched.is_empty() {
        notes.push(format!("{} tensors differ that are not in the adapter", untouched.len()));
    }
    let saved = wholes.iter().map(|whole| whole.tensor().to_owned()).collect();
    let about = pair.about(&modules, &wholes)?;
    base.check_unchanged()?;
    tuned.check_unchanged()?;
    output::write(out, modules, wholes, about, options.overwrite)?;
    Ok(ExtractReport { total: total(&reports), modules: reports, saved, untouched, parameters, notes })
}

/// Returns the place of a model, named by its directory.
fn of_dir(model: &Checkpoint) -> Place {
    Place::Model(model.dir().display().to_string())
}

/// Reports tensors that only one model has, or that differ in shape or kind.
fn shape_problems(base: &Checkpoint, tuned: &Checkpoint) -> Vec<Problem> {
    let mut problems = Vec::new();
    let only = |of: &Checkpoint, other: &Checkpoint| {
        let names = of.names().into_iter().filter(|n| other.info(n).is_none());
        let lacks = |name: &str| {
            let (tensor, of) = (name.to_owned(), of.dir().display().to_string());
            Problem::new(of_dir(other), AdapterProblem::LacksTensor { tensor, other: of })
        };
        names.map(lacks).collect::<Vec<_>>()
    };
    problems.extend(only(base, tuned));
    let untied = tied_table(base).is_some() && base.info(HEAD).is_none() && tuned.info(HEAD).is_some();
    if untied {
        problems.push(Problem::new(of_dir(tuned), AdapterProblem::Untied));
    } else {
        problems.extend(only(tuned, base));
    }
    for name in base.names() {
        let (Some(x), Some(y)) = (base.info(name), tuned.info(name)) else { continue };
        if x.shape != y.shape {
            let kind = AdapterProblem::ShapesDiffer { base: x.shape.clone(), tuned: y.shape.clone() };
            problems.push(Problem::new(Place::tensor(name), kind));
        }
        if is_float(x.dtype) != is_float(y.dtype) {
            let kind = AdapterProblem::DtypesDiffer { base: x.dtype, tuned: y.dtype };
            problems.push(Problem::new(Place::tensor(name), kind));
        }
    }
    problems
}

/// A module to extract.
struct Wanted {
    name: String,
    kind: LayerKind,
    shape: [usize; 2],
}

fn modules(base: &Checkpoint, targets: &[String], problems: &mut Vec<Problem>) -> Vec<Wanted> {
    let matrices = base.names().into_iter().filter_map(|tensor| {
        let info = base.info(tensor)?;
        let shape: [usize; 2] = info.shape.as_slice().try_into().ok()?;
        let name = tensor.strip_suffix(".weight")?;
        is_float(info.dtype).then(|| {
            let group = TensorGroup::new(tensor, &info.shape, None, Vec::new());
            let table = !group.is_matrix() && !name.ends_with("lm_head") && !name.ends_with("embed_out");
            let kind = if table { LayerKind::Embedding } else { LayerKind::Linear };
            (Wanted { name: name.to_owned(), kind, shape }, group.is_matrix())
        })
    });
    let matrices: Vec<(Wanted, bool)> = matrices.collect();
    let matches = |name: &str, target: &str| name == target || name.ends_with(&format!(".{target}"));
    for target in targets.iter().filter(|t| *t != "all-linear") {
        if !matrices.iter().any(|(m, _)| matches(&m.name, target)) {
            let kind = AdapterProblem::UnknownTarget { target: target.clone(), base: base.dir().to_owned() };
            problems.push(Problem::whole(kind));
        }
    }
    let all_linear = targets.is_empty() || targets.iter().any(|t| t == "all-linear");
    let wanted = |m: &Wanted, linear: bool| (all_linear && linear) || targets.iter().any(|t| matches(&m.name, t));
    matrices.into_iter().filter(|(m, linear)| wanted(m, *linear)).map(|(m, _)| m).collect()
}

/// Returns the tensors of the modules that are stored in full.
fn saved<'b>(base: &'b Checkpoint, modules_to_save: &[String], problems: &mut Vec<Problem>) -> Vec<&'b str> {
    let tensors = || base.names().into_iter().filter(|tensor| base.info(tensor).is_some_and(|i| is_float(i.dtype)));
    for entry in modules_to_save {
        if !tensors().any(|tensor| module_of(tensor).ends_with(entry.as_str())) {
            let kind = AdapterProblem::UnknownSaved { entry: entry.clone(), base: base.dir().to_owned() };
            problems.push(Problem::whole(kind));
        }
    }
    let wanted = |tensor: &&str| modules_to_save.iter().any(|entry| module_of(tensor).ends_with(entry.as_str()));
    tensors().filter(wanted).collect()
}

fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

struct Pair<'p> {
    base: &'p Checkpoint,
    tuned: &'p Checkpoint,
    options: &'p ExtractOptions,
    /// Tensors that are stored in full if they differ.
    saved: Vec<&'p str>,
}

impl Pair<'_> {
    fn bytes(&self, module: &Wanted) -> usize {
        4 * module.shape[0] * module.shape[1] + dense::scratch(module.shape, self.options.rank) + 16 * READ
    }

    fn memory_problem(&self, modules: &[Wanted]) -> Option<Problem> {
        let elements = |tensor: &&str| self.base.info(tensor).map_or(0, |info| info.shape.iter().product::<usize>());
        let of_modules = modules.iter().map(|m| (self.bytes(m), m.name.as_str()));
        let of_saved = self.saved.iter().map(|tensor| (8 * elements(tensor), module_of(tensor)));
        let (most, module) = of_modules.chain(of_saved).max()?;
        // Tensors stored in full stay in memory until they are written.
        let kept = self.saved.iter().map(elements).sum::<usize>() * self.options.dtype.dtype().bitsize() / 8;
        let (allowed, needed) = (self.options.memory, FIXED + kept + most);
        let short = || Problem::whole(MemoryProblem::Extract { allowed, module: module.to_owned(), needed });
        (needed > allowed).then(short)
    }

    /// Extracts the modules; `None` for modules that do not differ.
    fn extract(&self, modules: &[Wanted]) -> Result<Vec<Option<(NewModule, ModuleReport)>>, Error> {
        let budget = Budget::new(self.options.memory - FIXED);
        let mut jobs: Vec<usize> = (0..modules.len()).collect();
        jobs.sort_by_key(|&i| (std::cmp::Reverse(modules[i].shape[0] * modules[i].shape[1]), i));
        let make = |&i: &usize| {
            let _room = budget.take(self.bytes(&modules[i]));
            (i, stop_if_asked(&self.options.interrupt).and_then(|()| self.module(&modules[i])))
        };
        let mut made: Vec<_> = jobs.par_iter().with_max_len(1).map(make).collect();
        made.sort_by_key(|(i, _)| *i);
        made.into_iter().map(|(_, made)| made).collect()
    }

    fn module(&self, module: &Wanted) -> Result<Option<(NewModule, ModuleReport)>, Error> {
        let difference = self.difference(&format!("{}.weight", module.name))?;
        if difference.iter().all(|&v| v == 0.0) {
            return Ok(None);
        }
        let cut = Dense { values: &difference, shape: module.shape }.leading(self.options.rank, &module.name)?;
        let factors = cut.factors.encode(&module.name, module.kind, self.options.dtype.dtype())?;
        let report = ModuleReport {
            module: module.name.clone(),
            rank: factors.rank,
            norm: cut.energy.sqrt(),
            energy: (cut.energy - cut.lost) / cut.energy,
            relative_error: ((cut.lost + factors.changed) / cut.energy).sqrt(),
        };
        Ok(Some((NewModule { name: module.name.clone(), kind: module.kind, shape: module.shape, factors }, report)))
    }

    /// Computes `tuned − base` in f32.
    fn difference(&self, tensor: &str) -> Result<Vec<f32>, Error> {
        let (of_base, of_tuned) = (self.base.dir().display().to_string(), self.tuned.dir().display().to_string());
        let info = |c: &Checkpoint| c.info(tensor).expect("both have the same tensors").clone();
        let (x, y) = (info(self.base), info(self.tuned));
        let base = Values::from_source(&of_base, self.base, tensor, x.dtype);
        let tuned = Values::from_source(&of_tuned, self.tuned, tensor, y.dtype);
        let group = TensorGroup::new(tensor, &x.shape, Some(base), vec![tuned]);
        let mut differences = group.load_task_vectors()?;
        Ok(differences.swap_remove(0))
    }

    /// Returns the tensors that are stored in full, if they differ.
    fn whole(&self) -> Result<Vec<NewWhole>, Error> {
        let found =
            self.saved.iter().map(|tensor| stop_if_asked(&self.options.interrupt).and_then(|()| self.full(tensor)));
        found.filter_map(Result::transpose).collect()
    }

    fn full(&self, tensor: &str) -> Result<Option<NewWhole>, Error> {
        if self.difference(tensor)?.iter().all(|&v| v == 0.0) {
            return Ok(None);
        }
        let info = self.tuned.info(tensor).expect("both have the same tensors").clone();
        let dtype = self.options.dtype.dtype();
        let values = convert::to_f32(info.dtype, self.tuned.bytes(tensor)?).expect("a floating dtype");
        let bytes = convert::from_f32(dtype, &values).expect("f32, f16 or bf16");
        let back = convert::to_f32(dtype, &bytes).expect("it was written as such");
        match back.iter().position(|v| !v.is_finite()) {
            None => Ok(Some(NewWhole::saved(tensor.to_owned(), info.shape, bytes))),
            Some(index) => Err(Error::Overflow { tensor: tensor.to_owned(), index, value: values[index], dtype }),
        }
    }

    /// Returns the tensors that differ but do not belong to these modules.
    fn untouched(&self, modules: &[Wanted]) -> Result<Vec<Untouched>, Error> {
        let taken = |tensor: &&str| {
            self.saved.contains(tensor) || modules.iter().any(|m| tensor.strip_suffix(".weight") == Some(&m.name))
        };
        let rest: Vec<&str> = self.base.names().into_iter().filter(|tensor| !taken(tensor)).collect();
        let found: Vec<Result<Option<Untouched>, Error>> =
            rest.par_iter().map(|tensor| self.left_out(tensor)).collect();
        found.into_iter().filter_map(Result::transpose).collect()
    }

    fn left_out(&self, tensor: &str) -> Result<Option<Untouched>, Error> {
        let info = self.base.info(tensor).expect("it is one of its names");
        if !is_float(info.dtype) {
            let same = self.base.bytes(tensor)? == self.tuned.bytes(tensor)?;
            return Ok((!same).then(|| Untouched { tensor: tensor.to_owned(), norm: f64::NAN }));
        }
        let difference = self.difference(tensor)?;
        let norm = kernels::dot(&difference, &difference).sqrt();
        Ok((norm > 0.0).then(|| Untouched { tensor: tensor.to_owned(), norm }))
    }

    fn about(&self, modules: &[NewModule], wholes: &[NewWhole]) -> Result<About, Error> {
        let settings = json!({
            "rank": self.options.rank,
            "targets": self.options.targets,
            "modules_to_save": self.options.modules_to_save,
            "dtype": self.options.dtype,
        });
        let manifest = Manifest::new("adapter")
            .with_config(json!({ "extract": settings }))
            .with_source("base", self.base.dir(), self.base.content_hash()?)
            .with_source("tuned", self.tuned.dir(), self.tuned.content_hash()?);
        let name = |model: &Checkpoint| HubSnapshot::model_name(model.dir());
        let inputs = [(name(self.base), "base".to_owned()), (name(self.tuned), "tuned model".to_owned())];
        let done = format!("The difference of two models, cut to rank {} by its singular values.", self.options.rank);
        let text = serde_json::to_string_pretty(&settings).unwrap_or_default();
        let names: Vec<&str> = modules.iter().map(|m| m.name.as_str()).collect();
        Ok(About {
            card: card::card(Some(&inputs[0].0), "Extracted adapter", &done, &inputs, &text),
            base_model: Some(inputs[0].0.clone()),
            task_type: Some("CAUSAL_LM".to_owned()),
            targets: output::shortest(&names, Some(self.base)),
            experts: output::experts_of(self.base),
            as_one: tied_table(self.base).is_some_and(|table| wholes.iter().any(|w| w.tensor() == table)),
            dtype: self.options.dtype.dtype(),
            manifest,
        })
    }
}
