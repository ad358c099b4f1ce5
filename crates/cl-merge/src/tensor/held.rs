//! Bytes of a tensor that are kept between two passes over it.
//!
//! If a method reads a whole tensor before it merges it, reading it again from the page cache would cost more than the
//! arithmetic.

use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use super::group::READ;
use crate::Error;

/// The bytes of one run of pieces, with one buffer per input.
type Bytes = Vec<Vec<u8>>;

/// Buffers that are reused from tensor to tensor, because the operating system has to zero new memory.
#[derive(Default)]
pub(crate) struct Buffers(Mutex<Vec<Bytes>>);

/// The bytes of a tensor that were read so far, in runs of [`READ`] elements.
pub(crate) struct Held<'b> {
    buffers: &'b Buffers,
    elements: usize,
    runs: Vec<OnceLock<Bytes>>,
}

impl<'b> Held<'b> {
    /// Creates empty storage for a tensor with this number of elements.
    pub(super) fn new(buffers: &'b Buffers, elements: usize) -> Held<'b> {
        Held { buffers, elements, runs: (0..elements.div_ceil(READ)).map(|_| OnceLock::new()).collect() }
    }

    /// Whether this range is exactly one of the runs.
    pub(super) fn is_run(&self, range: &Range<usize>) -> bool {
        range.start.is_multiple_of(READ) && range.end == self.elements.min(range.start + READ)
    }

    /// Returns the bytes of a run, which are read on the first call.
    pub(super) fn get_or_read(
        &self,
        run: &Range<usize>,
        read: impl FnOnce(&mut Bytes) -> Result<(), Error>,
    ) -> Result<&[Vec<u8>], Error> {
        let place = &self.runs[run.start / READ];
        if let Some(bytes) = place.get() {
            return Ok(bytes);
        }
        let mut bytes = self.buffers.0.lock().expect("no panic while held").pop().unwrap_or_default();
        read(&mut bytes)?;
        Ok(place.get_or_init(|| bytes))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let bytes = self.runs.iter_mut().filter_map(OnceLock::take);
        self.buffers.0.lock().expect("no panic while held").extend(bytes);
    }
}
