//! Execution of a plan: reads, merges and writes all tensors on all cores, in bounded memory.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cl_checkpoint::{CheckpointWriter, Dtype, Interrupt, WriteOptions, convert};
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::budget::{Budget, Room};
use super::options::{MergeOptions, threads};
use super::provenance;
use crate::Error;
use crate::methods::{Measured, OpcmNorms, held_bytes, merge_runs};
use crate::plan::Plan;
use crate::plan::inputs::STATE_NAME;
use crate::plan::work::{PlannedTensor, Segment, Source, Work};
use crate::tensor::select::{Trim, trim_models};
use crate::tensor::{Buffers, Piece, READ, TensorGroup, copy_bytes, kernels};

/// Tensors with at least this many elements are processed one after another by all threads; smaller ones in parallel.
const LARGE: usize = 4 << 20;

/// Summary of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of tensors written.
    pub tensors: usize,
    /// Number of tensors among them that were copied unchanged.
    pub copied: usize,
    /// Number of tensor bytes written.
    pub bytes: u64,
}

/// Runs a plan and writes the model directory `out` atomically. `progress` is called with the number of bytes written
/// so far, from any thread.
///
/// # Errors
/// Returns an error for non-finite values, values outside the range of the output's dtype, an input that changes while
/// it is read, a stop request, or if reading or writing fails; no output is left then.
pub fn merge(
    plan: &Plan,
    out: &Path,
    options: &MergeOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Summary, Error> {
    let threads = threads(options);
    plan.peak_memory(options)?;
    let write = WriteOptions { max_shard_size: options.max_shard_size, overwrite: options.overwrite };
    let writer = CheckpointWriter::create(out, &plan.tensors(), write)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| Error::Io { path: out.to_owned(), source: std::io::Error::other(e) })?;
    let merging = Merging {
        plan,
        writer: &writer,
        budget: Budget::new(options.memory.saturating_sub(plan.fixed_bytes() + threads * plan.piece_bytes())),
        buffers: Buffers::default(),
        written: AtomicU64::new(0),
        states: Mutex::default(),
        progress,
        options,
    };
    // If an input changes while it is read, another error often occurs first.
    let changed = |error| plan.check_unchanged().err().unwrap_or(error);
    pool.install(|| merging.all()).map_err(changed)?;
    provenance::put_files(plan, &writer)?;
    let mut states = merging.states.into_inner().expect("no panic while held");
    if !states.is_empty() {
        // Tensors finish in any order; the written files must not depend on it.
        states.sort_keys();
        writer.put_json(STATE_NAME, &Value::Object(states))?;
    }
    let manifest = provenance::manifest(plan, options.hash_inputs)?;
    plan.check_unchanged()?;
    writer.finish(manifest)?;
    let copied = plan.tensors.iter().filter(|t| matches!(t.work, Work::Copy(_))).count();
    Ok(Summary { tensors: plan.tensors.len(), copied, bytes: plan.bytes_written() })
}

/// A merge in progress.
struct Merging<'p> {
    plan: &'p Plan,
    writer: &'p CheckpointWriter,
    budget: Budget,
    buffers: Buffers,
    written: AtomicU64,
    states: Mutex<Map<String, Value>>,
    progress: &'p (dyn Fn(u64) + Sync),
    options: &'p MergeOptions,
}

impl Merging<'_> {
    fn all(&self) -> Result<(), Error> {
        let trims = self.plan.model_trims(&self.options.interrupt)?;
        let mut jobs: Vec<(usize, &PlannedTensor)> = self.plan.tensors.iter().enumerate().collect();
        // Large tensors first: at the end, other threads then wait only for small ones.
        jobs.sort_by_key(|(i, t)| (std::cmp::Reverse(t.elements()), *i));
        // A method that needs a whole matrix works on it with one thread, in parallel with other tensors.
        let (large, small): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|(_, t)| t.elements() >= LARGE && self.plan.workspace(t) < LARGE);
        let (norms, kept) = self.norms(&large, &small)?;
        let of_model = |i: usize| OfModel { trims: &trims[i], norms: norms.as_ref(), kept: &kept[i] };
        for (i, tensor) in large {
            self.tensor(tensor, of_model(i), true)?;
        }
        small.par_iter().with_max_len(1).try_for_each(|(i, tensor)| self.tensor(tensor, of_model(*i), false))
    }

    /// Computes norms over the whole model, summed in the order of tensors, if the method scales by them. Also returns
    /// the values that were kept of each tensor.
    fn norms(
        &self,
        large: &[(usize, &PlannedTensor)],
        small: &[(usize, &PlannedTensor)],
    ) -> Result<(Option<OpcmNorms>, Vec<Kept<'_>>), Error> {
        let spare = AtomicUsize::new(self.plan.spare(self.options));
        let measure = |tensor: &PlannedTensor, parallel: bool| -> Result<_, Error> {
            let Work::Merge(segments) = &tensor.work else { return Ok(None) };
            let Some(segment) = segments.first().filter(|s| s.whole) else { return Ok(None) };
            let mut group = self.group(tensor, segment);
            group.parallel = parallel;
            let bytes = segment.method.kept(&group);
            let fits = |spare: usize| spare.checked_sub(bytes);
            let keep = bytes > 0 && spare.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
            let _room = self.budget.take(segment.method.workspace(&group));
            let Some(Measured { norms, kept }) = segment.method.measure(&group, keep)? else { return Ok(None) };
            Ok(Some((norms, kept.map(|values| (values, self.budget.take(bytes))))))
        };
        let mut parts: Vec<_> = self.plan.tensors.iter().map(|_| None).collect();
        for (i, tensor) in large {
            parts[*i] = measure(tensor, true)?;
        }
        let measured: Vec<Result<_, Error>> =
            small.par_iter().with_max_len(1).map(|(i, tensor)| Ok((*i, measure(tensor, false)?))).collect();
        for part in measured {
            let (i, part) = part?;
            parts[i] = part;
        }
        let mut sum: Option<OpcmNorms> = None;
        let kept = parts.into_iter().map(|part| {
            let (norms, kept) = part?;
            *sum.get_or_insert_default() += &norms;
            kept
        });
        let kept = kept.map(Mutex::new).collect();
        Ok((sum, kept))
    }

    fn tensor(&self, tensor: &PlannedTensor, of_model: OfModel<'_, '_>, parallel: bool) -> Result<(), Error> {
        match &tensor.work {
            Work::Copy(source) => self.copy(tensor, source),
            Work::Merge(segments) => {
                segments.iter().try_for_each(|segment| self.segment(tensor, segment, of_model, parallel))
            }
        }
    }

    fn copy(&self, tensor: &PlannedTensor, source: &Source) -> Result<(), Error> {
        let input = &self.plan.inputs.models[source.model];
        let dtype = tensor.spec.dtype;
        copy_bytes(input.source(), &source.tensor, |offset, bytes| {
            if !self.options.allow_non_finite
                && let Some((index, value)) = convert::first_not_finite(dtype, bytes)
            {
                let (model, tensor) = (input.path.display().to_string(), source.tensor.clone());
                let index = index + offset * 8 / dtype.bitsize().max(1);
                return Err(Error::NotFinite { model, tensor, index, value });
            }
            self.write(tensor, offset, bytes)
        })
    }

    fn segment(
        &self,
        tensor: &PlannedTensor,
        segment: &Segment,
        OfModel { trims, norms, kept }: OfModel<'_, '_>,
        parallel: bool,
    ) -> Result<(), Error> {
        let mut group = self.group(tensor, segment);
        group.parallel = parallel;
        group.model_trims = trims.clone().filter(|_| segment.whole);
        let kept = if segment.whole { kept.lock().expect("no panic while held").take() } else { None };
        // The room is held as long as the values.
        let (kept, _kept_room) = kept.unzip();
        let scaled = norms.filter(|_| segment.whole).and_then(|norms| segment.method.with_norms(norms, kept));
        let method = scaled.as_ref().unwrap_or(&segment.method);
        let _room = self.budget.take(method.workspace(&group));
        // Tensors that all threads work on together are too large to be held.
        let held = if parallel { 0 } else { held_bytes(&**method, &group) };
        let held_room = if held > 0 { self.budget.try_take(held) } else { None };
        if held_room.is_some() {
            group.hold(&self.buffers);
        }
        let dtype = tensor.spec.dtype;
        let overflow = |piece: &Piece, out: &[f32]| {
            let i = out.iter().position(|v| v.to_bits() & 0x7fff_ffff >= beyond(dtype)).expect("the largest is there");
            let index = segment.elements.start + piece.start + i;
            Error::Overflow { tensor: tensor.spec.name.clone(), index, value: out[i], dtype }
        };
        let (_, state) = merge_runs(
            &**method,
            &group,
            |rounded: &mut Rounded, piece, out| {
                if kernels::largest_key(out) >= beyond(dtype) {
                    rounded.overflow.get_or_insert_with(|| overflow(piece, out));
                }
                round(dtype, out, &mut rounded.bytes);
            },
            |start, rounded| match rounded.overflow {
                Some(error) => Err(error),
                None => self.write(tensor, (segment.elements.start + start) * (dtype.bitsize() / 8), &rounded.bytes),
            },
        )?;
        if let Some(state) = state {
            self.states.lock().expect("no panic while held").insert(tensor.spec.name.clone(), state);
        }
        tracing::debug!(tensor = tensor.spec.name.as_str(), "merged");
        Ok(())
    }

    /// The values of a tensor, whose reading stops when that is requested.
    fn group<'g>(&'g self, tensor: &'g PlannedTensor, segment: &'g Segment) -> TensorGroup<'g> {
        TensorGroup { interrupt: Some(&self.options.interrupt), ..self.plan.group(tensor, segment) }
    }

    fn write(&self, tensor: &PlannedTensor, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.writer.write_part(&tensor.spec.name, offset, bytes)?;
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        (self.progress)(written);
        if self.options.interrupt.requested() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Results for a tensor from a pass over the whole model.
#[derive(Clone, Copy)]
struct OfModel<'k, 'b> {
    trims: &'k Option<Vec<Trim>>,
    norms: Option<&'k OpcmNorms>,
    kept: &'k Kept<'b>,
}

/// The values kept of a tensor until it is merged, and the memory that they take.
type Kept<'b> = Mutex<Option<(Vec<f32>, Room<'b>)>>;

/// Merged values, rounded to the output's dtype.
#[derive(Default)]
struct Rounded {
    bytes: Vec<u8>,
    overflow: Option<Error>,
}

/// Appends values in the given dtype, rounded to nearest even.
fn round(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::BF16 => {
            let before = bytes.len();
            if before == 0 {
                bytes.reserve(2 * READ);
            }
            bytes.resize(before + 2 * values.len(), 0);
            kernels::f32_to_bf16(values, &mut bytes[before..]);
        }
        other => bytes.extend(convert::from_f32(other, values).expect("the plan has f32, f16 and bf16 only")),
    }
}

/// Returns the bits of the smallest magnitude that rounds to infinity.
fn beyond(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::BF16 => 0x7f7f_8000,
        Dtype::F16 => 65_520f32.to_bits(),
        _ => f32::INFINITY.to_bits(),
    }
}

impl Plan {
    /// Checks that no input has changed since the merge was planned.
    fn check_unchanged(&self) -> Result<(), Error> {
        Ok(self.inputs.models.iter().try_for_each(|input| input.check_unchanged())?)
    }

    /// Returns the trims of each tensor if the whole model is trimmed at once; otherwise `None` for all.
    fn model_trims(&self, interrupt: &Interrupt) -> Result<Vec<Option<Vec<Trim>>>, Error> {
        let mut trims = vec![None; self.tensors.len()];
        let Some(density) = &self.whole_model_trim else { return Ok(trims) };
        let mut groups = Vec::new();
        let mut places = Vec::new();
        for (i, tensor) in self.tensors.iter().enumerate() {
            if let Work::Merge(segments) = &tensor.work
                && let Some(segment) = segments.first().filter(|s| s.whole)
            {
                groups.push(TensorGroup { interrupt: Some(interrupt), ..self.group(tensor, segment) });
                places.push(i);
            }
        }
        for (place, trim) in places.into_iter().zip(trim_models(&groups, density)?) {
            trims[place] = Some(trim);
        }
        Ok(trims)
    }
}
