//! Folding of adapters into their base model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::{
    Adapter, Checkpoint, CheckpointWriter, Dtype, Interrupt, LayerKind, Manifest, OutputDir, TensorSource, TensorSpec,
    WriteOptions,
};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::set::{HEAD, Module, Set, Whole, base_tensor, load, tied_table};
use super::threads::{on_threads, stop_if_asked};
use super::whole;
use crate::Error;
use crate::methods::Undefined;
use crate::problem::{AdapterProblem, Place, Problem};
use crate::tensor::copy_bytes;

/// Options for folding adapters.
#[derive(Clone, Debug)]
pub struct FoldOptions {
    /// One weight per adapter; 1 if empty.
    pub weights: Vec<f64>,
    /// Number of threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Maximum number of tensor bytes per file.
    pub max_shard_size: u64,
    /// Whether to replace an existing output.
    pub overwrite: bool,
    /// Stop request.
    pub interrupt: Interrupt,
    /// Whether to accept adapters whose manifests name another base.
    pub ignore_base: bool,
    /// Whether to also compute the result of folding one adapter after another, rounded each time, and report the
    /// difference.
    pub drift: bool,
}

impl Default for FoldOptions {
    /// Weights of one, all cores, shards of 5 GB; nothing is overwritten.
    fn default() -> Self {
        FoldOptions {
            weights: Vec::new(),
            threads: 0,
            max_shard_size: 5_000_000_000,
            overwrite: false,
            interrupt: Interrupt::default(),
            ignore_base: false,
            drift: false,
        }
    }
}

/// Report of folding.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FoldReport {
    /// Number of changed matrices.
    pub folded: usize,
    /// Number of tensors copied byte for byte.
    pub copied: usize,
    /// Largest absolute difference between the sum and the stored value.
    pub max_rounding_error: f64,
    /// Whether embedding and head, tied in the base, are separate tensors in the output, because only one of them was
    /// adapted or each has its own update.
    pub untied: bool,
    /// Difference from folding one adapter after another, if requested.
    pub drift: Option<Drift>,
    /// Notes.
    pub notes: Vec<String>,
}

/// Difference between folding adapters one after another, rounded to the base's dtype each time, and their sum rounded
/// once.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Drift {
    /// Modules by name.
    pub modules: Vec<ModuleDrift>,
    /// All modules together.
    pub total: ModuleDrift,
}

/// Drift of one module, or of all modules together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ModuleDrift {
    /// Name of the module; empty for all modules together.
    pub module: String,
    /// Largest difference of an element.
    pub max: f64,
    /// Mean absolute difference.
    pub mean: f64,
    /// `‖difference‖ / ‖Σ ΔW‖`.
    pub relative: f64,
    /// Error of the sum rounded once, relative to `‖Σ ΔW‖`.
    pub once: f64,
    /// Error of folding one after another, relative to `‖Σ ΔW‖`.
    pub repeated: f64,
    /// Number of elements that differ.
    pub differing: usize,
    /// Number of elements.
    pub elements: usize,
}

/// Writes `base + Σ scalingᵢ·BᵢAᵢ` as a model directory in the base's dtypes: [`fold_with`] with weights of 1, for
/// adapters of any base, such as those of a sequence of rounds.
///
/// # Errors
/// Returns the errors of [`fold_with`].
pub fn fold(
    base: &Checkpoint,
    adapters: &[Adapter],
    out: &Path,
    manifest: Manifest,
    overwrite: bool,
) -> Result<FoldReport, Error> {
    let options = FoldOptions { overwrite, ignore_base: true, ..FoldOptions::default() };
    fold_with(base, adapters, out, manifest, &options)
}

/// Writes `base + Σ weightᵢ·scalingᵢ·BᵢAᵢ` as a model directory in the base's dtypes.
///
/// The sum over all adapters is computed in f64 and rounded once, to nearest even, so that the adapters of a whole
/// sequence of rounds are rounded only once. Tensors without an adapter are copied byte for byte, and so are tokenizer
/// and config. A DoRA adapter can only be folded alone: `m · (W + s·BA) / ‖W + s·BA‖`, with norms over rows, or over
/// columns for an embedding (Liu et al., arXiv 2402.09353, as PEFT merges it).
///
/// If embedding and head are tied in the base, an adapter on one of them changes only that one: both are written, and
/// `tie_word_embeddings` becomes false.
///
/// # Errors
/// Returns [`Error::Problems`] for adapters that do not fit the base, and an error for values that are not finite or
/// outside the range of the base's dtype, or if reading or writing fails.
pub fn fold_with(
    base: &Checkpoint,
    adapters: &[Adapter],
    out: &Path,
    manifest: Manifest,
    options: &FoldOptions,
) -> Result<FoldReport, Error> {
    let mut problems = Vec::new();
    let mut set = Set::new(adapters, &options.weights, &mut problems);
    set.check_against(base, &mut problems)?;
    dora_problems(&set, &mut problems);
    if !options.ignore_base {
        set.check_base_hash(base, &mut problems)?;
    }
    if !problems.is_empty() {
        return Err(Error::Problems(problems));
    }
    check_output(base, adapters, out, options.overwrite)?;
    let mut report = FoldReport { notes: set.notes.clone(), ..FoldReport::default() };
    let targets = targets(base, &set, &mut report);
    let specs: Vec<TensorSpec> = targets.iter().map(|t| t.spec.clone()).collect();
    let write = WriteOptions { max_shard_size: options.max_shard_size, overwrite: options.overwrite };
    let writer = CheckpointWriter::create(out, &specs, write)?;
    let interrupt = &options.interrupt;
    let sums = Folding { base, set: &set };
    let fold = Fold { sums, base, set: &set, writer: &writer, drift: options.drift && adapters.len() > 1, interrupt };
    let (sums, whole_rounding) = on_threads(options.threads, || Ok((fold.all(&targets)?, fold.wholes(&targets)?)))?;
    report.max_rounding_error = sums.iter().fold(whole_rounding, |most, (_, sums)| most.max(sums.rounding));
    report.drift = fold.drift.then(|| drift(&set.modules, &sums));
    let grown = grown(base, &set);
    for (name, file) in companions(base, grown.map(|(member, _)| &*set.members[member].adapter))? {
        writer.copy_file(&file, &name)?;
    }
    let mut config = base.config().clone();
    if let Some((_, rows)) = grown {
        config.insert("vocab_size".to_owned(), rows.into());
    }
    if report.untied {
        config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    }
    writer.put_json("config.json", &Value::Object(config))?;
    base.check_unchanged()?;
    adapters.iter().try_for_each(Adapter::check_unchanged)?;
    writer.finish(manifest)?;
    Ok(report)
}

/// Checks the output path; see [`OutputDir::check`].
pub(super) fn check_output(base: &Checkpoint, adapters: &[Adapter], out: &Path, overwrite: bool) -> Result<(), Error> {
    let mut inputs: Vec<(&str, &Path)> = adapters.iter().map(|a| ("an adapter", a.dir())).collect();
    inputs.push(("the base model", base.dir()));
    Ok(OutputDir::check(out, overwrite, &inputs)?)
}

/// Reports DoRA adapters that are weighted or folded with others. DoRA normalizes the base plus one complete update, so
/// it is not defined for part of an update or for several updates.
pub(super) fn dora_problems(set: &Set<'_>, problems: &mut Vec<Problem>) {
    let Some(dora) = set.members.iter().find(|m| m.adapter.config().use_dora) else { return };
    let mut add = |kind: AdapterProblem| problems.push(Problem::new(Place::adapter(&dora.name), kind));
    if set.members.len() > 1 {
        add(AdapterProblem::DoraNotAlone);
    }
    if dora.weight != 1.0 {
        add(AdapterProblem::DoraWeight { weight: dora.weight });
    }
}

/// A tensor of the output.
pub(super) struct Target {
    pub(super) spec: TensorSpec,
    /// Name of the base tensor that it is computed from.
    pub(super) source: String,
    /// Index in `Set::modules` of the module that changes it.
    pub(super) module: Option<usize>,
    /// Index in `Set::wholes` of the entry that changes it.
    pub(super) whole: Option<usize>,
}

/// Returns the index of the adapter that adds tokens, and the number of rows of the enlarged token tables.
pub(super) fn grown(base: &Checkpoint, set: &Set<'_>) -> Option<(usize, usize)> {
    set.wholes.iter().find_map(|whole| {
        let before = base.info(&base_tensor(base, &whole.tensor))?.shape.first().copied()?;
        let rows = whole.shape(set, Some(base)).first().copied()?;
        (rows > before).then_some((whole.parts[0].member, rows))
    })
}

/// Returns the companion files by name. If an adapter adds tokens, its tokenizer replaces the base's.
pub(super) fn companions(
    base: &Checkpoint,
    with_tokens: Option<&Adapter>,
) -> Result<BTreeMap<String, PathBuf>, cl_checkpoint::Error> {
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let own = with_tokens.map_or(Ok(Vec::new()), Adapter::tokenizer_files)?;
    Ok(base.companion_files()?.into_iter().chain(own).map(|file| (name(&file), file)).collect())
}

pub(super) fn targets(base: &Checkpoint, set: &Set<'_>, report: &mut FoldReport) -> Vec<Target> {
    let module = |tensor: &str| set.modules.iter().position(|m| m.tensor() == tensor);
    let whole = |tensor: &str| set.wholes.iter().position(|w| w.tensor == tensor);
    let changed = |tensor: &str| module(tensor).is_some() || whole(tensor).is_some();
    let table = tied_table(base);
    let mut names: Vec<&str> = base.names();
    if let Some(table) = &table {
        report.untied = !set.as_one && (changed(table) || changed(HEAD));
        if report.untied {
            report.notes.push(format!(
                "embeddings and head are one tensor in the base; `{table}` and `{HEAD}` were written apart, and \
                 tie_word_embeddings is false now"
            ));
            if base.info(HEAD).is_none() {
                names.push(HEAD);
            }
        }
    }
    let mut targets = Vec::new();
    for name in names {
        let source = if report.untied { base_tensor(base, name) } else { name.to_owned() };
        let Some(info) = base.info(&source) else { continue };
        // With `as_one`, a head that the base stores in addition to the tied embedding is treated as that embedding.
        let stands_for = if set.as_one { base_tensor(base, name) } else { name.to_owned() };
        let whole = whole(&stands_for);
        let shape = whole.map_or_else(|| info.shape.clone(), |i| set.wholes[i].shape(set, Some(base)));
        let spec = TensorSpec { name: name.to_owned(), dtype: info.dtype, shape };
        let target = Target { spec, source, module: module(name), whole };
        if changed(&stands_for) {
            report.folded += 1
        } else {
            report.copied += 1
        }
        targets.push(target);
    }
    targets
}

/// Number of elements per block of rows. It is constant, so that sums over blocks do not depend on the caller.
pub(super) const BLOCK: usize = 1 << 17;

struct Fold<'f> {
    sums: Folding<'f>,
    base: &'f Checkpoint,
    set: &'f Set<'f>,
    writer: &'f CheckpointWriter,
    drift: bool,
    interrupt: &'f Interrupt,
}

/// A base model and the adapters to add to it.
#[derive(Clone, Copy)]
pub(super) struct Folding<'f> {
    pub(super) base: &'f Checkpoint,
    pub(super) set: &'f Set<'f>,
}

/// The updates of one module, prepared for multiplication.
pub(super) struct Updates {
    /// Sorted by the names of the adapters.
    parts: Vec<Scaled>,
    /// DoRA's magnitudes, and for an embedding also the column norms.
    dora: Option<(Vec<f64>, Option<Vec<f64>>)>,
}

/// A low-rank update `factor · left · right`.
struct Scaled {
    member: usize,
    factor: f64,
    rank: usize,
    left: Vec<f64>,
    right: Vec<f64>,
}

/// Statistics of a block or of a module.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    rounding: f64,
    /// `‖Σ ΔW‖²`.
    energy: f64,
    drift_energy: f64,
    once_energy: f64,
    repeated_energy: f64,
    drift_sum: f64,
    drift_max: f64,
    differing: usize,
    elements: usize,
}

impl Sums {
    fn plus(self, other: Sums) -> Sums {
        Sums {
            rounding: self.rounding.max(other.rounding),
            energy: self.energy + other.energy,
            drift_energy: self.drift_energy + other.drift_energy,
            once_energy: self.once_energy + other.once_energy,
            repeated_energy: self.repeated_energy + other.repeated_energy,
            drift_sum: self.drift_sum + other.drift_sum,
            drift_max: self.drift_max.max(other.drift_max),
            differing: self.differing + other.differing,
            elements: self.elements + other.elements,
        }
    }

    fn drift(self, module: &str) -> ModuleDrift {
        let share = |energy: f64| if self.energy > 0.0 { (energy / self.energy).sqrt() } else { 0.0 };
        ModuleDrift {
            module: module.to_owned(),
            max: self.drift_max,
            mean: self.drift_sum / self.elements.max(1) as f64,
            relative: share(self.drift_energy),
            once: share(self.once_energy),
            repeated: share(self.repeated_energy),
            differing: self.differing,
            elements: self.elements,
        }
    }
}

fn drift(modules: &[Module], sums: &[(usize, Sums)]) -> Drift {
    let modules: Vec<ModuleDrift> = sums.iter().map(|(module, sums)| sums.drift(&modules[*module].name)).collect();
    let total = sums.iter().fold(Sums::default(), |all, (_, sums)| all.plus(*sums)).drift("");
    Drift { modules, total }
}

impl Fold<'_> {
    /// Writes the copied tensors, then the modules with factors, on all threads; returns the statistics of every
    /// module.
    fn all(&self, targets: &[Target]) -> Result<Vec<(usize, Sums)>, Error> {
        let copied: Vec<&Target> = targets.iter().filter(|t| t.module.is_none() && t.whole.is_none()).collect();
        copied.par_iter().try_for_each(|target| stop_if_asked(self.interrupt).and_then(|()| self.copy(target)))?;
        let changed: Vec<(&Target, usize)> = targets.iter().filter_map(|t| Some((t, t.module?))).collect();
        let mut sums: Vec<(usize, Sums)> = changed
            .par_iter()
            .with_max_len(1)
            .map(|(target, module)| {
                stop_if_asked(self.interrupt)?;
                Ok((*module, self.change(target, &self.set.modules[*module])?))
            })
            .collect::<Result<_, Error>>()?;
        sums.sort_by_key(|(module, _)| *module);
        Ok(sums)
    }

    /// Writes the tensors that are changed other than by factors; returns the largest rounding error.
    fn wholes(&self, targets: &[Target]) -> Result<f64, Error> {
        let mut rounding = 0.0f64;
        for (target, index) in targets.iter().filter_map(|t| Some((t, t.whole?))) {
            stop_if_asked(self.interrupt)?;
            rounding = rounding.max(self.whole(target, &self.set.wholes[index])?);
        }
        Ok(rounding)
    }

    fn whole(&self, target: &Target, whole: &Whole) -> Result<f64, Error> {
        let view = whole.view(self.set, Some(self.base), false);
        let (dtype, name) = (target.spec.dtype, &target.spec.name);
        let block = |rows: std::ops::Range<usize>| -> Result<f64, Error> {
            let values = self.sums.whole_rows(whole, &view, rows.clone())?;
            let start = rows.start * view.columns;
            let (mut bytes, mut rounding) = (Vec::new(), 0.0f64);
            for (i, &value) in values.iter().enumerate() {
                let rounded = store(dtype, value, &mut bytes);
                if !rounded.is_finite() {
                    let (tensor, index) = (name.clone(), start + i);
                    return Err(Error::Overflow { tensor, index, value: value as f32, dtype });
                }
                rounding = rounding.max((rounded - value).abs());
            }
            self.writer.write_part(name, start * (dtype.bitsize() / 8), &bytes)?;
            Ok(rounding)
        };
        let blocks = blocks([view.rows(), view.columns]);
        let done: Vec<Result<f64, Error>> = blocks.into_par_iter().map(block).collect();
        done.into_iter().try_fold(0.0, |most: f64, rounding| Ok(most.max(rounding?)))
    }

    fn copy(&self, target: &Target) -> Result<(), Error> {
        let name = &target.spec.name;
        copy_bytes(self.base, &target.source, |at, bytes| Ok(self.writer.write_part(name, at, bytes)?))
    }

    fn change(&self, target: &Target, module: &Module) -> Result<Sums, Error> {
        let updates = self.sums.updates(target, module)?;
        let blocks = blocks(module.shape);
        let sums: Vec<Result<Sums, Error>> =
            blocks.par_iter().map(|rows| self.block(target, module, &updates, rows.clone())).collect();
        sums.into_iter().try_fold(Sums::default(), |all, sums| Ok(all.plus(sums?)))
    }

    fn block(
        &self,
        target: &Target,
        module: &Module,
        updates: &Updates,
        rows: std::ops::Range<usize>,
    ) -> Result<Sums, Error> {
        let (columns, dtype) = (module.shape[1], target.spec.dtype);
        let (base, sum) = self.sums.rows(target, module, updates, &rows)?;
        let mut sums = Sums { elements: sum.len(), ..Sums::default() };
        let mut bytes = Vec::with_capacity(sum.len() * dtype.bitsize() / 8);
        let mut stored = Vec::with_capacity(sum.len());
        for (i, &value) in sum.iter().enumerate() {
            let rounded = store(dtype, value, &mut bytes);
            if !rounded.is_finite() {
                let (tensor, index) = (target.spec.name.clone(), rows.start * columns + i);
                return Err(Error::Overflow { tensor, index, value: value as f32, dtype });
            }
            sums.rounding = sums.rounding.max((rounded - value).abs());
            stored.push(rounded);
        }
        if self.drift {
            self.measure_drift(module, updates, &rows, (base, &sum, &stored, dtype), &mut sums);
        }
        self.writer.write_part(&target.spec.name, rows.start * columns * (dtype.bitsize() / 8), &bytes)?;
        Ok(sums)
    }

    /// Folds the adapters one after another in the given order, and compares the result with folding them at once.
    fn measure_drift(
        &self,
        module: &Module,
        updates: &Updates,
        rows: &std::ops::Range<usize>,
        (base, sum, stored, dtype): (Vec<f64>, &[f64], &[f64], Dtype),
        sums: &mut Sums,
    ) {
        sums.energy = base.iter().zip(sum).map(|(w, s)| (s - w) * (s - w)).sum();
        let mut values = base;
        let mut bytes = Vec::with_capacity(8);
        for member in 0..self.set.members.len() {
            for part in updates.parts.iter().filter(|part| part.member == member) {
                part.add(&mut values, rows, module.shape[1]);
                for value in &mut values {
                    bytes.clear();
                    *value = store(dtype, *value, &mut bytes);
                }
            }
        }
        for ((value, stored), exact) in values.iter().zip(stored).zip(sum) {
            let difference = (value - stored).abs();
            sums.once_energy += (stored - exact) * (stored - exact);
            sums.repeated_energy += (value - exact) * (value - exact);
            sums.drift_max = sums.drift_max.max(difference);
            sums.drift_sum += difference;
            sums.drift_energy += difference * difference;
            sums.differing += usize::from(difference != 0.0);
        }
    }
}

impl Folding<'_> {
    /// Computes some rows of the base, and the same rows with all updates added.
    pub(super) fn rows(
        &self,
        target: &Target,
        module: &Module,
        updates: &Updates,
        rows: &std::ops::Range<usize>,
    ) -> Result<(Vec<f64>, Vec<f64>), Error> {
        let columns = module.shape[1];
        let base = self.base_rows(target, module, rows)?;
        let mut sum = base.clone();
        updates.parts.iter().for_each(|part| part.add(&mut sum, rows, columns));
        if let Some((magnitude, norms)) = &updates.dora {
            scale(&mut sum, columns, rows.start, magnitude, norms.as_deref()).map_err(|kind| {
                let tensor = target.spec.name.clone();
                Error::Undefined { tensor, method: "DoRA", kind }
            })?;
        }
        Ok((base, sum))
    }

    /// Computes some rows of a tensor that is changed other than by factors.
    pub(super) fn whole_rows(
        &self,
        whole: &Whole,
        view: &whole::View,
        rows: std::ops::Range<usize>,
    ) -> Result<Vec<f64>, Error> {
        let weights: Vec<f64> = self.set.members.iter().map(|m| m.weight).collect();
        let base = whole::base_rows(Some(self.base), &whole.tensor, view, rows.clone())?;
        whole::weighted(self.set, whole, view, rows, &weights, &base)
    }

    pub(super) fn updates(&self, target: &Target, module: &Module) -> Result<Updates, Error> {
        let mut parts = Vec::new();
        for part in &module.parts {
            let update = self.set.load(part)?;
            let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect();
            let factor = self.set.members[part.member].weight * part.scaling;
            let (left, right) = (wide(&update.left), wide(&update.right));
            parts.push(Scaled { member: part.member, factor, rank: update.rank, left, right });
        }
        let name = |member: usize| &self.set.members[member].name;
        parts.sort_by(|x, y| name(x.member).cmp(name(y.member)).then(x.factor.total_cmp(&y.factor)));
        let mut updates = Updates { parts, dora: None };
        let first = &module.parts[0];
        let member = &self.set.members[first.member];
        if let Some(tensor) = member.adapter.magnitude(&first.module) {
            let magnitude = load(&member.adapter, &member.name, &tensor)?.into_iter().map(f64::from).collect();
            let columns = module.kind == LayerKind::Embedding;
            let norms = columns.then(|| self.column_norms(target, module, &updates)).transpose()?;
            updates.dora = Some((magnitude, norms));
        }
        Ok(updates)
    }

    /// Computes the column norms of `W + ΔW` over all rows, block by block.
    fn column_norms(&self, target: &Target, module: &Module, updates: &Updates) -> Result<Vec<f64>, Error> {
        let columns = module.shape[1];
        let mut squares = vec![0.0; columns];
        for rows in blocks(module.shape) {
            let mut sum = self.base_rows(target, module, &rows)?;
            updates.parts.iter().for_each(|part| part.add(&mut sum, &rows, columns));
            for row in sum.chunks(columns) {
                squares.iter_mut().zip(row).for_each(|(s, v)| *s += v * v);
            }
        }
        Ok(squares.into_iter().map(f64::sqrt).collect())
    }

    /// Reads some rows of the base.
    fn base_rows(&self, target: &Target, module: &Module, rows: &std::ops::Range<usize>) -> Result<Vec<f64>, Error> {
        let (columns, dtype) = (module.shape[1], target.spec.dtype);
        let size = dtype.bitsize() / 8;
        let mut bytes = vec![0; rows.len() * columns * size];
        self.base.read(&target.source, rows.start * columns * size, &mut bytes)?;
        let values = whole::to_f64(dtype, &bytes);
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(Error::NotFinite {
                model: self.base.dir().display().to_string(),
                tensor: target.source.clone(),
                index: rows.start * columns + i,
                value: values[i] as f32,
            }),
        }
    }
}

impl Scaled {
    /// Computes `out += factor · left[rows] · right`.
    fn add(&self, out: &mut [f64], rows: &std::ops::Range<usize>, columns: usize) {
        let left = &self.left[rows.start * self.rank..rows.end * self.rank];
        let left = MatRef::from_row_major_slice(left, rows.len(), self.rank);
        let right = MatRef::from_row_major_slice(&self.right, self.rank, columns);
        let out = MatMut::from_row_major_slice_mut(out, rows.len(), columns);
        matmul(out, Accum::Add, left, right, self.factor, Par::Seq);
    }
}

/// Splits a matrix into blocks of rows that are processed together.
pub(super) fn blocks([rows, columns]: [usize; 2]) -> Vec<std::ops::Range<usize>> {
    let length = (BLOCK / columns.max(1)).max(1);
    (0..rows).step_by(length).map(|start| start..rows.min(start + length)).collect()
}

/// Computes DoRA's `m · v / ‖v‖` over rows, or over columns if their norms are given.
fn scale(
    values: &mut [f64],
    columns: usize,
    first: usize,
    magnitude: &[f64],
    norms: Option<&[f64]>,
) -> Result<(), Undefined> {
    for (i, row) in values.chunks_mut(columns).enumerate() {
        match norms {
            None => {
                let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
                if norm == 0.0 {
                    return Err(Undefined::NoDirection { column: false, index: first + i });
                }
                row.iter_mut().for_each(|v| *v *= magnitude[first + i] / norm);
            }
            Some(norms) => {
                if let Some(j) = norms.iter().position(|norm| *norm == 0.0) {
                    return Err(Undefined::NoDirection { column: true, index: j });
                }
                row.iter_mut().zip(magnitude.iter().zip(norms)).for_each(|(v, (m, norm))| *v *= m / norm);
            }
        }
    }
    Ok(())
}

/// Appends a value in a dtype, rounded once to nearest even, and returns the rounded value.
pub(super) fn store(dtype: Dtype, value: f64, bytes: &mut Vec<u8>) -> f64 {
    match dtype {
        Dtype::F64 => {
            bytes.extend(value.to_le_bytes());
            value
        }
        Dtype::BF16 => {
            let rounded = bf16::from_f32(to_odd(value));
            bytes.extend(rounded.to_le_bytes());
            rounded.to_f64()
        }
        Dtype::F16 => {
            let rounded = f16::from_f32(to_odd(value));
            bytes.extend(rounded.to_le_bytes());
            rounded.to_f64()
        }
        _ => {
            let rounded = value as f32;
            bytes.extend(rounded.to_le_bytes());
            f64::from(rounded)
        }
    }
}

/// Rounds to f32 such that a second rounding, to a narrower dtype, gives the same result as rounding once: towards
/// zero, with the last bit set if the result is inexact (rounding to odd; Boldo and Melquiond 2008).
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || !nearest.is_finite() {
        return nearest;
    }
    let towards_zero = if back.abs() > value.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(towards_zero | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values half-way between two bf16 values, plus or minus less than f32 can represent: rounding twice would go to
    /// even.
    #[test]
    fn values_are_rounded_once() {
        let half = 1.0 + 1.0 / 256.0;
        let stored = |value: f64| store(Dtype::BF16, value, &mut Vec::new());
        assert_eq!(stored(half), 1.0);
        assert_eq!(stored(half + 1e-12), 1.0 + 1.0 / 128.0);
        assert_eq!(stored(half - 1e-12), 1.0);
        assert_eq!(stored(1.0 + 3.0 / 256.0 - 1e-12), 1.0 + 1.0 / 128.0);
        assert_eq!(stored(-half - 1e-12), -1.0 - 1.0 / 128.0);
        let half = 1.0 + 1.0 / 2048.0;
        assert_eq!(store(Dtype::F16, half + 1e-12, &mut Vec::new()), 1.0 + 1.0 / 1024.0);
        assert_eq!(store(Dtype::F16, half, &mut Vec::new()), 1.0);
        assert_eq!(store(Dtype::F32, 0.1, &mut Vec::new()), f64::from(0.1f32));
    }

    #[test]
    fn blocks_cover_all_rows() {
        let all = blocks([1000, 300]);
        assert_eq!((all[0].start, all.last().unwrap().end), (0, 1000));
        assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start) && all.len() > 2);
        assert_eq!(blocks([3, BLOCK * 2]), [0..1, 1..2, 2..3]);
    }
}
