//! Runs a plan: reads, merges and writes all tensors on all cores, in bounded memory.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Interrupt, TensorSource, WriteOptions, convert};
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::method::merge_runs;
use crate::methods::OpcmNorms;
use crate::plan::{PlannedTensor, Segment, Source, Work};
use crate::select::{Trim, trim_models};
use crate::tensor::READ;
use crate::{Error, PIECE, Piece, Plan, kernels, provenance};

/// Tensors of so many elements are worked on by all threads together, one after another; smaller ones side by side.
const LARGE: usize = 4 << 20;

/// Bytes of everything that is neither pieces nor a method's own: the program, headers, one buffer of hashing.
pub(crate) const FIXED: usize = 32 << 20;

/// Gives a tensor's bytes to `write` as they are, a megabyte at a time, with the place of each part's first byte; an empty
/// tensor's too, once.
pub(crate) fn copy_bytes(
    source: &Checkpoint,
    tensor: &str,
    write: impl Fn(usize, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let length = source.info(tensor).map_or(0, |info| info.byte_len());
    let mut buffer = vec![0; length.min(1 << 20)];
    let mut offset = 0;
    loop {
        let part = buffer.len().min(length - offset);
        source.read(tensor, offset, &mut buffer[..part])?;
        write(offset, &buffer[..part])?;
        offset += part;
        if offset == length {
            return Ok(());
        }
    }
}

/// What a method that goes on from its own output needs, per tensor.
pub(crate) const STATE_NAME: &str = "merge_state.json";

/// How a merge is run.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// Bytes that may be held at a time.
    pub memory: usize,
    /// Threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Bytes of tensors in one file.
    pub max_shard_size: u64,
    /// Replace an output that exists.
    pub overwrite: bool,
    /// Hash the inputs' files into the manifest. Inputs that this project wrote carry their hash already.
    pub hash_inputs: bool,
    /// Copy tensors that hold NaN or infinities as they are; otherwise they are an error. Merged values are numbers in any case.
    pub allow_non_finite: bool,
    /// A request to stop.
    pub interrupt: Interrupt,
}

impl Default for MergeOptions {
    /// 1 GiB, all cores, shards of 5 GB; nothing is overwritten.
    fn default() -> Self {
        MergeOptions {
            memory: 1 << 30,
            threads: 0,
            max_shard_size: 5_000_000_000,
            overwrite: false,
            hash_inputs: false,
            allow_non_finite: false,
            interrupt: Interrupt::default(),
        }
    }
}

/// What a merge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Tensors written.
    pub tensors: usize,
    /// Of these, copied as they were.
    pub copied: usize,
    /// Bytes of tensors written.
    pub bytes: u64,
}

/// Runs a plan and writes the model directory `out`, which appears whole or not at all. `progress` is called with the number
/// of bytes written so far, from any thread.
///
/// # Errors
/// Values that are not finite, an output dtype that is too narrow, an input that changes while it is read, a stop, and the
/// operating system's answers; nothing is left then.
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
    let run = Run {
        plan,
        writer: &writer,
        budget: Budget::new(options.memory.saturating_sub(FIXED + threads * plan.piece_bytes())),
        written: AtomicU64::new(0),
        states: Mutex::default(),
        progress,
        options,
    };
    // What is written to while it is read often fails in another way first.
    let changed = |error| plan.check_unchanged().err().unwrap_or(error);
    pool.install(|| run.all()).map_err(changed)?;
    provenance::put_files(plan, &writer)?;
    let mut states = run.states.into_inner().expect("no panic while held");
    if !states.is_empty() {
        // Tensors end in any order; files do not depend on it.
        states.sort_keys();
        writer.put_json(STATE_NAME, &Value::Object(states))?;
    }
    let manifest = provenance::manifest(plan, options.hash_inputs)?;
    plan.check_unchanged()?;
    writer.finish(manifest)?;
    let copied = plan.tensors.iter().filter(|t| matches!(t.work, Work::Copy(_))).count();
    Ok(Summary { tensors: plan.tensors.len(), copied, bytes: plan.bytes_written() })
}

pub(crate) fn threads(options: &MergeOptions) -> usize {
    match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => at_most(threads),
    }
}

/// No more threads than any machine has cores: results do not depend on it, and to start a hundred thousand takes minutes.
pub(crate) fn at_most(threads: usize) -> usize {
    threads.min(1024)
}

struct Run<'p> {
    plan: &'p Plan,
    writer: &'p CheckpointWriter,
    budget: Budget,
    written: AtomicU64,
    states: Mutex<Map<String, Value>>,
    progress: &'p (dyn Fn(u64) + Sync),
    options: &'p MergeOptions,
}

impl Run<'_> {
    fn all(&self) -> Result<(), Error> {
        let trims = self.plan.model_trims()?;
        let mut jobs: Vec<(usize, &PlannedTensor)> = self.plan.tensors.iter().enumerate().collect();
        // Large ones first: the last of several small ones keeps other threads waiting for less.
        jobs.sort_by_key(|(i, t)| (std::cmp::Reverse(t.elements()), *i));
        // What holds a whole matrix works on it alone, and side by side with others.
        let (large, small): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|(_, t)| t.elements() >= LARGE && self.plan.workspace(t) < LARGE);
        let norms = self.norms(&large, &small)?;
        for (i, tensor) in large {
            self.tensor(tensor, (&trims[i], &norms), true)?;
        }
        small.par_iter().with_max_len(1).try_for_each(|(i, tensor)| self.tensor(tensor, (&trims[*i], &norms), false))
    }

    /// Norms over the whole model, summed in the order of tensors, where the method scales by them.
    fn norms(
        &self,
        large: &[(usize, &PlannedTensor)],
        small: &[(usize, &PlannedTensor)],
    ) -> Result<Option<OpcmNorms>, Error> {
        let measure = |tensor: &PlannedTensor, parallel: bool| {
            let Work::Merge(segments) = &tensor.work else { return Ok(None) };
            let Some(segment) = segments.first().filter(|s| s.whole) else { return Ok(None) };
            let mut group = self.plan.group(tensor, segment);
            group.parallel = parallel;
            let _room = self.budget.take(segment.method.workspace(&group));
            segment.method.measure(&group)
        };
        let mut parts = vec![None; self.plan.tensors.len()];
        for (i, tensor) in large {
            parts[*i] = measure(tensor, true)?;
        }
        let measured: Vec<Result<(usize, Option<OpcmNorms>), Error>> =
            small.par_iter().with_max_len(1).map(|(i, tensor)| Ok((*i, measure(tensor, false)?))).collect();
        for part in measured {
            let (i, norms) = part?;
            parts[i] = norms;
        }
        Ok(parts.into_iter().flatten().reduce(|mut sum, part| {
            sum += &part;
            sum
        }))
    }

    fn tensor(
        &self,
        tensor: &PlannedTensor,
        of_model: (&Option<Vec<Trim>>, &Option<OpcmNorms>),
        parallel: bool,
    ) -> Result<(), Error> {
        match &tensor.work {
            Work::Copy(source) => self.copy(tensor, source),
            Work::Merge(segments) => {
                segments.iter().try_for_each(|segment| self.segment(tensor, segment, of_model, parallel))
            }
        }
    }

    fn copy(&self, tensor: &PlannedTensor, source: &Source) -> Result<(), Error> {
        let checkpoint = &self.plan.inputs.models[source.model].checkpoint;
        let dtype = tensor.spec.dtype;
        copy_bytes(checkpoint, &source.tensor, |offset, bytes| {
            if !self.options.allow_non_finite
                && let Some((index, value)) = convert::first_not_finite(dtype, bytes)
            {
                let (model, tensor) = (checkpoint.dir().display().to_string(), source.tensor.clone());
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
        (trims, norms): (&Option<Vec<Trim>>, &Option<OpcmNorms>),
        parallel: bool,
    ) -> Result<(), Error> {
        let mut group = self.plan.group(tensor, segment);
        group.parallel = parallel;
        group.model_trims = trims.clone().filter(|_| segment.whole);
        let scaled = norms.as_ref().filter(|_| segment.whole).and_then(|norms| segment.method.with_norms(norms));
        let method = scaled.as_ref().unwrap_or(&segment.method);
        let _room = self.budget.take(method.workspace(&group));
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
        Ok(())
    }

    fn write(&self, tensor: &PlannedTensor, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.writer.write_part(&tensor.spec.name, offset, bytes)?;
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        (self.progress)(written);
        if self.options.interrupt.requested() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Merged values in the output's dtype.
#[derive(Default)]
struct Rounded {
    bytes: Vec<u8>,
    overflow: Option<Error>,
}

/// Appends values in another dtype, rounded to nearest even.
fn round(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::BF16 => {
            let before = bytes.len();
            bytes.resize(before + 2 * values.len(), 0);
            kernels::f32_to_bf16(values, &mut bytes[before..]);
        }
        other => bytes.extend(convert::from_f32(other, values).expect("the plan has f32, f16 and bf16 only")),
    }
}

/// Bits of the smallest magnitude that rounds to infinity.
fn beyond(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::BF16 => 0x7f7f_8000,
        Dtype::F16 => 65_520f32.to_bits(),
        _ => f32::INFINITY.to_bits(),
    }
}

impl PlannedTensor {
    pub(crate) fn elements(&self) -> usize {
        self.spec.shape.iter().product()
    }
}

impl Plan {
    /// That no input was replaced or overwritten since the merge was planned.
    fn check_unchanged(&self) -> Result<(), Error> {
        Ok(self.inputs.models.iter().try_for_each(|input| input.checkpoint.check_unchanged())?)
    }

    /// What a trim over the whole model keeps, per tensor; `None` for all where there is no such trim.
    fn model_trims(&self) -> Result<Vec<Option<Vec<Trim>>>, Error> {
        let mut trims = vec![None; self.tensors.len()];
        let Some(density) = &self.whole_model_trim else { return Ok(trims) };
        let mut groups = Vec::new();
        let mut places = Vec::new();
        for (i, tensor) in self.tensors.iter().enumerate() {
            if let Work::Merge(segments) = &tensor.work
                && let Some(segment) = segments.first().filter(|s| s.whole)
            {
                groups.push(self.group(tensor, segment));
                places.push(i);
            }
        }
        for (place, trim) in places.into_iter().zip(trim_models(&groups, density)?) {
            trims[place] = Some(trim);
        }
        Ok(trims)
    }

    /// Bytes of one thread's pieces.
    pub(crate) fn piece_bytes(&self) -> usize {
        let bytes = |segment: &Segment| {
            let inputs = segment.models.len() + usize::from(segment.base.is_some());
            let columns = segment.shape.last().copied().unwrap_or(1);
            let rows = segment.method.whole_rows();
            let (piece, read) = if rows { (PIECE.max(columns), READ.max(columns)) } else { (PIECE, READ) };
            // Inputs, scratch and output as f32, words and random numbers; bytes as read and as written, of four at most.
            piece * (4 * (inputs + 4) + 4 + 2) + 4 * read * (inputs + 1)
        };
        let segments = self.tensors.iter().filter_map(|t| match &t.work {
            Work::Merge(segments) => Some(segments),
            Work::Copy(_) => None,
        });
        segments.flatten().map(bytes).max().unwrap_or(1 << 20)
    }

    /// The largest tensor's need beside pieces, and its name.
    pub(crate) fn largest_workspace(&self) -> (usize, &str) {
        let needs = self.tensors.iter().map(|t| (self.workspace(t), t.spec.name.as_str()));
        needs.max_by_key(|(bytes, _)| *bytes).unwrap_or((0, ""))
    }

    /// Bytes that are held at most, of those allowed.
    ///
    /// # Errors
    /// [`Error::Problems`] when these are not enough.
    pub fn peak_memory(&self, options: &MergeOptions) -> Result<usize, Error> {
        let threads = threads(options);
        let pieces = threads * self.piece_bytes();
        let (workspace, tensor) = self.largest_workspace();
        let needed = FIXED + pieces + workspace;
        if needed <= options.memory {
            let side_by_side = self.workspaces().take(threads).sum::<usize>();
            return Ok(options.memory.min(FIXED + pieces + side_by_side.max(workspace)));
        }
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        Err(Error::Problems(vec![format!(
            "{} MiB of memory are not enough: {threads} threads hold {} MiB, tensor `{tensor}` needs {} MiB; allow {} MiB \
             or fewer threads",
            mib(options.memory),
            mib(FIXED + pieces),
            mib(workspace),
            mib(needed)
        )]))
    }

    /// What a tensor needs beside pieces.
    fn workspace(&self, tensor: &PlannedTensor) -> usize {
        match &tensor.work {
            Work::Copy(_) => 1 << 20,
            Work::Merge(segments) => {
                segments.iter().map(|s| s.method.workspace(&self.group(tensor, s))).max().unwrap_or(0)
            }
        }
    }

    /// What each tensor needs beside pieces, largest first.
    fn workspaces(&self) -> impl Iterator<Item = usize> {
        let mut needs: Vec<usize> = self.tensors.iter().map(|t| self.workspace(t)).collect();
        needs.sort_unstable_by(|a, b| b.cmp(a));
        needs.into_iter()
    }
}

/// A number of bytes that may be held at a time.
pub(crate) struct Budget {
    free: Mutex<usize>,
    freed: Condvar,
}

/// Bytes taken from a budget until this is dropped.
pub(crate) struct Room<'b> {
    budget: &'b Budget,
    bytes: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Budget {
        Budget { free: Mutex::new(bytes), freed: Condvar::new() }
    }

    /// Waits until so many bytes are free. That more than all are never asked for was checked beforehand.
    pub(crate) fn take(&self, bytes: usize) -> Room<'_> {
        let mut free = self.free.lock().expect("no panic while held");
        while *free < bytes {
            free = self.freed.wait(free).expect("no panic while held");
        }
        *free -= bytes;
        Room { budget: self, bytes }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        *self.budget.free.lock().expect("no panic while held") += self.bytes;
        self.budget.freed.notify_all();
    }
}
