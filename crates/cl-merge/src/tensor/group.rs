//! One tensor of a base and of several models, read in pieces.

use std::cell::Cell;
use std::ops::Range;

use cl_checkpoint::{Dtype, Interrupt, TensorSource, convert};
use rayon::prelude::*;

use super::held::{Buffers, Held};
use super::kernels;
use super::trim::Trim;
use crate::Error;

/// Number of elements per piece: small enough that the pieces of all models stay in a core's cache. It is constant,
/// because sums over pieces depend on it.
pub const PIECE: usize = 2048;

/// Number of elements in pieces that are read together, because short reads cost more per byte.
pub(crate) const READ: usize = 16 * PIECE;

/// Whether values of this type can be read and written.
pub(crate) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Whether this is an 8-bit type that can be read.
pub(crate) fn is_eight_bit(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// Whether [`Values`] can be read from this type.
pub(crate) fn is_readable(dtype: Dtype) -> bool {
    is_float(dtype) || is_eight_bit(dtype)
}

/// The values of one tensor in one model.
#[derive(Clone, Copy)]
pub struct Values<'a> {
    origin: Origin<'a>,
    model: &'a str,
    skip: usize,
}

#[derive(Clone, Copy)]
enum Origin<'a> {
    Memory(&'a [f32]),
    Source { source: &'a dyn TensorSource, tensor: &'a str, dtype: Dtype },
}

impl<'a> Values<'a> {
    /// Values in memory; `model` is the name used in errors and for random numbers.
    pub fn from_slice(model: &'a str, values: &'a [f32]) -> Values<'a> {
        Values { origin: Origin::Memory(values), model, skip: 0 }
    }

    /// A floating-point tensor (f64, f32, f16, bf16 or 8-bit) of a checkpoint.
    pub fn from_source(model: &'a str, source: &'a dyn TensorSource, tensor: &'a str, dtype: Dtype) -> Values<'a> {
        Values { origin: Origin::Source { source, tensor, dtype }, model, skip: 0 }
    }

    /// The same values without the first `elements` elements.
    pub fn skip(self, elements: usize) -> Values<'a> {
        Values { skip: self.skip + elements, ..self }
    }

    /// The model's name.
    pub fn model(&self) -> &'a str {
        self.model
    }

    /// Checks that these can be the values of a tensor with so many elements.
    fn check(&self, tensor: &str, elements: usize) -> Result<(), Error> {
        match self.origin {
            Origin::Memory(values) if values.len() != self.skip.saturating_add(elements) => Err(Error::ValueCount {
                model: Some(self.model.to_owned()),
                tensor: tensor.to_owned(),
                found: values.len().saturating_sub(self.skip),
                expected: elements,
            }),
            Origin::Source { dtype, .. } if !is_readable(dtype) => {
                Err(Error::NotFloat { model: self.model.to_owned(), tensor: tensor.to_owned(), dtype })
            }
            _ => Ok(()),
        }
    }

    /// Bytes per element to read; 0 for values in memory.
    fn size(&self) -> usize {
        match self.origin {
            Origin::Memory(_) => 0,
            Origin::Source { dtype, .. } => dtype.bitsize() / 8,
        }
    }

    /// Reads the bytes of `len` elements starting at `start`; has no effect for values in memory.
    fn read(&self, start: usize, len: usize, bytes: &mut Vec<u8>) -> Result<(), Error> {
        if let Origin::Source { source, tensor, .. } = self.origin {
            let size = self.size();
            bytes.resize(len * size, 0);
            source.read(tensor, (self.skip + start) * size, bytes)?;
        }
        Ok(())
    }

    /// Converts the elements starting at `start` to f32, minus `base` if it is not empty, and returns an error if a
    /// result is not finite. `bytes` were read by [`Values::read`] starting at element `from`.
    fn convert(
        &self,
        tensor: &str,
        (bytes, from): (&[u8], usize),
        start: usize,
        base: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        if self.convert_unchecked(bytes, from, start, base, out) < f32::INFINITY.to_bits() {
            return Ok(());
        }
        // The base is known to be finite, so either a value of this model is not finite, or a difference overflows.
        self.convert_unchecked(bytes, from, start, &[], out);
        let index = out.iter().position(|v| !v.is_finite()).unwrap_or(0);
        let value = if out[index].is_finite() { f32::INFINITY } else { out[index] };
        Err(Error::NotFinite { model: self.model.to_owned(), tensor: tensor.to_owned(), index: start + index, value })
    }

    /// [`Values::convert`] without the check; returns the bits of the largest magnitude.
    fn convert_unchecked(&self, bytes: &[u8], from: usize, start: usize, base: &[f32], out: &mut [f32]) -> u32 {
        match self.origin {
            Origin::Memory(values) => out.copy_from_slice(&values[self.skip + start..][..out.len()]),
            Origin::Source { dtype, .. } => {
                let size = dtype.bitsize() / 8;
                let bytes = &bytes[(start - from) * size..][..out.len() * size];
                match dtype {
                    Dtype::BF16 if base.is_empty() => return kernels::read_bf16(bytes, out),
                    Dtype::BF16 => return kernels::read_bf16_minus(bytes, base, out),
                    _ => {
                        let values = convert::to_f32(dtype, bytes).or_else(|| convert::f8_to_f32(dtype, bytes));
                        let values = values.expect("checked to be floating");
                        out.copy_from_slice(&values);
                    }
                }
            }
        }
        if !base.is_empty() {
            kernels::subtract(out, base);
        }
        kernels::largest_key(out)
    }
}

/// One tensor of a base, if there is one, and of all models, in a fixed order.
pub struct TensorGroup<'a> {
    /// Name in the output.
    pub name: &'a str,
    /// Shape, outermost dimension first.
    pub shape: &'a [usize],
    /// The base's values.
    pub base: Option<Values<'a>>,
    /// The models' values.
    pub models: Vec<Values<'a>>,
    /// Whether several threads can process pieces.
    pub parallel: bool,
    /// Entries of this tensor kept by trimming over the whole model, per model; `None` if tensors are trimmed
    /// separately.
    pub model_trims: Option<Vec<Trim>>,
    /// Bytes that were read, for later passes.
    pub(crate) held: Option<Held<'a>>,
    /// Stops reading when requested: a pass over large tensors can take long before anything is written.
    pub(crate) interrupt: Option<&'a Interrupt>,
}

/// Groups ranges into runs that are read together, of up to [`READ`] elements or a single longer range.
pub(crate) fn runs(ranges: &[Range<usize>]) -> Vec<&[Range<usize>]> {
    let longest = ranges.iter().map(Range::len).max().unwrap_or(1).max(1);
    ranges.chunks((READ / longest).max(1)).collect()
}

/// A part of a tensor: elements `start..start + len` of every input, as f32. Methods can overwrite them.
#[derive(Default)]
pub struct Piece {
    /// Flat index of the first element.
    pub start: usize,
    /// The base's values; empty without a base.
    pub base: Vec<f32>,
    /// The models' values.
    pub models: Vec<Vec<f32>>,
    /// Scratch buffers for values, with arbitrary content.
    pub scratch: Vec<Vec<f32>>,
    /// Scratch buffer for keys, with arbitrary content.
    pub words: Vec<u32>,
    /// Scratch buffer for random numbers, with arbitrary content.
    pub random: Vec<u16>,
    /// Bytes read from the base and the models, for several pieces.
    bytes: Vec<Vec<u8>>,
    task_vectors: bool,
}

impl Piece {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.models.first().map_or(self.base.len(), Vec::len)
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Converts the models' values to differences from the base's, in f32; has no effect on pieces read as task
    /// vectors.
    pub fn subtract_base(&mut self) {
        if !std::mem::replace(&mut self.task_vectors, true) {
            for model in &mut self.models {
                kernels::subtract(model, &self.base);
            }
        }
    }

    /// `N` zeroed scratch buffers of the piece's length.
    pub fn zeros<const N: usize>(&mut self) -> [Vec<f32>; N] {
        let len = self.len();
        std::array::from_fn(|_| {
            let mut buffer = self.scratch.pop().unwrap_or_default();
            buffer.clear();
            buffer.resize(len, 0.0);
            buffer
        })
    }

    /// Returns scratch buffers for later use.
    pub fn give_back<const N: usize>(&mut self, buffers: [Vec<f32>; N]) {
        self.scratch.extend(buffers);
    }
}

thread_local! {
    /// The buffers of one piece per thread, so that a pass does not allocate memory.
    static SPARE: Cell<Option<Piece>> = const { Cell::new(None) };
}

impl<'a> TensorGroup<'a> {
    /// A tensor of this shape, outermost dimension first; the base, if there is one, and each model must have this
    /// number of values, which is checked when they are read. It is merged on the calling thread and trimmed separately.
    pub fn new(
        name: &'a str,
        shape: &'a [usize],
        base: Option<Values<'a>>,
        models: Vec<Values<'a>>,
    ) -> TensorGroup<'a> {
        TensorGroup { name, shape, base, models, parallel: false, model_trims: None, held: None, interrupt: None }
    }

    /// Keeps what is read in these buffers ([`TensorGroup::bytes`] bytes), so that a second pass does not read again.
    pub(crate) fn hold(&mut self, buffers: &'a Buffers) {
        self.held = Some(Held::new(buffers, self.elements()));
    }

    /// Number of bytes to read for all inputs.
    pub(crate) fn bytes(&self) -> usize {
        self.elements() * self.base.iter().chain(&self.models).map(Values::size).sum::<usize>()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of elements per row: the last dimension, or the whole vector.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Whether this is a matrix other than an embedding, to which methods based on singular values apply.
    pub fn is_matrix(&self) -> bool {
        let table = ["embed_tokens", "lm_head", "wte.", "wpe.", "embed_out", "word_embeddings"];
        self.shape.len() == 2 && self.shape.iter().all(|&d| d > 1) && !table.iter().any(|t| self.name.contains(t))
    }

    /// The ranges of pieces: of [`PIECE`] elements, or of as many whole rows as fit, at least one.
    pub fn pieces(&self, whole_rows: bool) -> Vec<Range<usize>> {
        let (elements, columns) = (self.elements(), self.columns().max(1));
        let length = if whole_rows { (PIECE / columns).max(1) * columns } else { PIECE };
        (0..elements).step_by(length).map(|start| start..elements.min(start + length)).collect()
    }

    /// Calls `f` with every piece of these consecutive ranges and returns the results. Everything is read at the start.
    /// With `task_vectors`, the models' values are differences from the base's.
    ///
    /// # Errors
    /// Returns an error if reading fails, or if an input has another number of values than the tensor.
    ///
    /// # Panics
    /// Panics if the ranges are not consecutive or exceed the tensor; see [`TensorGroup::pieces`].
    pub fn with_pieces<R>(
        &self,
        ranges: &[Range<usize>],
        task_vectors: bool,
        mut f: impl FnMut(&mut Piece) -> R,
    ) -> Result<Vec<R>, Error> {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return Ok(Vec::new()) };
        let all = first.start..last.end;
        let mut piece = SPARE.take().unwrap_or_default();
        piece.models.resize_with(self.models.len(), Vec::new);
        let mut buffers = std::mem::take(&mut piece.bytes);
        let bytes = match &self.held {
            Some(held) if held.is_run(&all) => held.get_or_read(&all, |bytes| self.read(&all, bytes))?,
            _ => {
                self.read(&all, &mut buffers)?;
                &buffers
            }
        };
        let mut results = Vec::with_capacity(ranges.len());
        for range in ranges {
            self.convert(&mut piece, range, (bytes, all.start), task_vectors)?;
            results.push(f(&mut piece));
        }
        piece.bytes = buffers;
        SPARE.set(Some(piece));
        Ok(results)
    }

    /// Reads the bytes of these elements of every input.
    fn read(&self, range: &Range<usize>, bytes: &mut Vec<Vec<u8>>) -> Result<(), Error> {
        if self.interrupt.is_some_and(Interrupt::requested) {
            return Err(Error::Interrupted);
        }
        bytes.resize_with(self.models.len() + 1, Vec::new);
        let (elements, mut inputs) = (self.elements(), self.base.iter().chain(&self.models).zip(bytes));
        inputs.try_for_each(|(values, bytes)| {
            values.check(self.name, elements)?;
            values.read(range.start, range.len(), bytes)
        })
    }

    /// Converts bytes that were read starting at element `from` to the values of a piece.
    fn convert(
        &self,
        piece: &mut Piece,
        range: &Range<usize>,
        (bytes, from): (&[Vec<u8>], usize),
        task_vectors: bool,
    ) -> Result<(), Error> {
        let Piece { base, models, .. } = piece;
        piece.start = range.start;
        piece.task_vectors = task_vectors;
        let mut bytes = bytes.iter();
        let mut next = || (bytes.next().expect("one for each input").as_slice(), from);
        base.clear();
        if let Some(values) = &self.base {
            base.resize(range.len(), 0.0);
            values.convert(self.name, next(), range.start, &[], base)?;
        }
        let base = if task_vectors { &base[..] } else { &[] };
        for (values, out) in self.models.iter().zip(models) {
            out.resize(range.len(), 0.0);
            values.convert(self.name, next(), range.start, base, out)?;
        }
        Ok(())
    }

    /// Calls `f` with every piece, on several threads if allowed, and returns the results in order.
    ///
    /// # Errors
    /// Returns the errors of [`TensorGroup::with_pieces`]; with several, the first in order.
    ///
    /// # Panics
    /// Panics under the same conditions as [`TensorGroup::with_pieces`].
    pub fn map_pieces<R: Send>(
        &self,
        ranges: &[Range<usize>],
        f: impl Fn(&mut Piece) -> R + Sync,
    ) -> Result<Vec<R>, Error> {
        self.map_runs(ranges, |run| self.with_pieces(run, false, &f))
    }

    /// As [`TensorGroup::map_pieces`], with the models' values as differences from the base's.
    ///
    /// # Errors
    /// Returns the errors of [`TensorGroup::with_pieces`]; with several, the first in order.
    ///
    /// # Panics
    /// Panics under the same conditions as [`TensorGroup::with_pieces`].
    pub fn map_task_vectors<R: Send>(
        &self,
        ranges: &[Range<usize>],
        f: impl Fn(&mut Piece) -> R + Sync,
    ) -> Result<Vec<R>, Error> {
        self.map_runs(ranges, |run| self.with_pieces(run, true, &f))
    }

    fn map_runs<R: Send>(
        &self,
        ranges: &[Range<usize>],
        f: impl Fn(&[Range<usize>]) -> Result<Vec<R>, Error> + Sync,
    ) -> Result<Vec<R>, Error> {
        Ok(self.map(&runs(ranges), |run| f(run))?.into_iter().flatten().collect())
    }

    /// Maps items, on several threads if allowed; returns the results in order, or the first error in order.
    pub(crate) fn map<T: Sync, R: Send>(
        &self,
        items: &[T],
        f: impl Fn(&T) -> Result<R, Error> + Sync,
    ) -> Result<Vec<R>, Error> {
        if self.parallel {
            let results: Vec<_> = items.par_iter().map(&f).collect();
            results.into_iter().collect()
        } else {
            items.iter().map(f).collect()
        }
    }

    /// All values of the base, or of a model, as f32.
    ///
    /// # Errors
    /// Returns an error if reading fails, or if these are not as many values as the tensor has.
    pub fn load(&self, values: &Values<'_>) -> Result<Vec<f32>, Error> {
        values.check(self.name, self.elements())?;
        let mut out = vec![0.0; self.elements()];
        let mut bytes = Vec::new();
        for (i, part) in out.chunks_mut(READ).enumerate() {
            values.read(i * READ, part.len(), &mut bytes)?;
            values.convert(self.name, (&bytes, i * READ), i * READ, &[], part)?;
        }
        Ok(out)
    }

    /// Task vectors of all models (differences from the base), as f32.
    ///
    /// # Errors
    /// Returns an error if reading fails.
    ///
    /// # Panics
    /// Panics without a base.
    pub fn load_task_vectors(&self) -> Result<Vec<Vec<f32>>, Error> {
        let base = self.load(self.base.as_ref().expect("a method of task vectors has a base"))?;
        self.models
            .iter()
            .map(|model| {
                let mut values = self.load(model)?;
                kernels::subtract(&mut values, &base);
                Ok(values)
            })
            .collect()
    }
}
