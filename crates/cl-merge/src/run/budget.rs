//! Peak memory of a plan, and the memory budget while it runs.

use std::sync::{Condvar, Mutex};

use super::options::{MergeOptions, threads};
use crate::Error;
use crate::methods::held_bytes;
use crate::plan::Plan;
use crate::plan::work::{PlannedTensor, Segment, Work};
use crate::problem::{MemoryProblem, Problem};
use crate::tensor::{PIECE, READ};

/// Fixed memory in bytes: the program, headers, and one buffer for hashing.
pub(crate) const FIXED: usize = 32 << 20;

impl Plan {
    /// Returns the memory that is held regardless of the current tensors.
    pub(super) fn fixed_bytes(&self) -> usize {
        let segments = self.tensors.iter().filter_map(|t| match &t.work {
            Work::Merge(segments) => Some(segments),
            Work::Copy(_) => None,
        });
        let sources = segments.flatten().flat_map(|s| s.models.iter().chain(&s.base));
        FIXED + sources.filter_map(|source| Some(source.table.as_ref()?.held())).sum::<usize>()
    }

    /// Returns the memory for the pieces of one thread.
    pub(super) fn piece_bytes(&self) -> usize {
        let bytes = |segment: &Segment| {
            let inputs = segment.models.len() + usize::from(segment.base.is_some());
            let columns = segment.shape.last().copied().unwrap_or(1);
            let rows = segment.method.whole_rows();
            let (piece, read) = if rows { (PIECE.max(columns), READ.max(columns)) } else { (PIECE, READ) };
            // Inputs, scratch and output as f32, words and random numbers; bytes as read and as written, at most four
            // per element. A reordered token table is read in whole rows: as bytes, as f32, and once more where rows
            // are assembled.
            let aligned = segment.models.iter().any(|s| s.table.is_some());
            let reordered = if aligned { 12 * (read + 2 * columns) } else { 0 };
            reordered + piece * (4 * (inputs + 4) + 4 + 2) + 4 * read * (inputs + 1)
        };
        let segments = self.tensors.iter().filter_map(|t| match &t.work {
            Work::Merge(segments) => Some(segments),
            Work::Copy(_) => None,
        });
        let folded: usize = self.inputs.models.iter().filter_map(|m| Some(m.folded.as_ref()?.room())).sum();
        segments.flatten().map(bytes).max().unwrap_or(1 << 20) + folded
    }

    /// Returns the workspace memory of the largest tensor, without pieces, and its name.
    pub(super) fn largest_workspace(&self) -> (usize, &str) {
        let needs = self.tensors.iter().map(|t| (self.workspace(t), t.spec.name.as_str()));
        needs.max_by_key(|(bytes, _)| *bytes).unwrap_or((0, ""))
    }

    /// Returns the peak memory in bytes, which is within the limit.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] if the limit is too low.
    pub fn peak_memory(&self, options: &MergeOptions) -> Result<usize, Error> {
        let threads = threads(options);
        let pieces = threads * self.piece_bytes();
        let (workspace, tensor) = self.largest_workspace();
        let fixed = self.fixed_bytes();
        let needed = fixed + pieces + workspace;
        if needed <= options.memory {
            let most = fixed + pieces + self.side_by_side(threads) + self.kept() + self.held(threads);
            return Ok(options.memory.min(most));
        }
        let (held, tensor) = (fixed + pieces, tensor.to_owned());
        let kind = MemoryProblem::Merge { allowed: options.memory, threads, held, tensor, largest: workspace };
        Err(Problem::whole(kind).into())
    }

    /// Returns the workspace memory of a tensor, without pieces.
    pub(super) fn workspace(&self, tensor: &PlannedTensor) -> usize {
        match &tensor.work {
            Work::Copy(_) => 1 << 20,
            Work::Merge(segments) => {
                segments.iter().map(|s| s.method.workspace(&self.group(tensor, s))).max().unwrap_or(0)
            }
        }
    }

    /// Returns the memory that is left while all threads work on the largest tensors.
    pub(super) fn spare(&self, options: &MergeOptions) -> usize {
        let threads = threads(options);
        let most = self.fixed_bytes() + threads * self.piece_bytes() + self.side_by_side(threads);
        options.memory.saturating_sub(most)
    }

    /// Returns the workspace memory of the largest tensors, one per thread, without pieces.
    fn side_by_side(&self, threads: usize) -> usize {
        self.workspaces().take(threads.max(1)).sum()
    }

    /// Returns the memory for values kept from the pass over norms until the merge.
    fn kept(&self) -> usize {
        let of_tensor = |tensor: &PlannedTensor| match &tensor.work {
            Work::Merge(segments) => {
                segments.first().filter(|s| s.whole).map_or(0, |s| s.method.kept(&self.group(tensor, s)))
            }
            Work::Copy(_) => 0,
        };
        self.tensors.iter().map(of_tensor).sum()
    }

    /// Returns the memory for inputs of the largest tensors, one per thread, held between two passes.
    fn held(&self, threads: usize) -> usize {
        let of_tensor = |tensor: &PlannedTensor| match &tensor.work {
            Work::Merge(segments) => {
                segments.iter().map(|s| held_bytes(&*s.method, &self.group(tensor, s))).max().unwrap_or(0)
            }
            Work::Copy(_) => 0,
        };
        let mut bytes: Vec<usize> = self.tensors.iter().map(of_tensor).collect();
        bytes.sort_unstable_by(|a, b| b.cmp(a));
        bytes.into_iter().take(threads.max(1)).sum()
    }

    /// Returns the workspace memory of each tensor, without pieces, in decreasing order.
    fn workspaces(&self) -> impl Iterator<Item = usize> {
        let mut needs: Vec<usize> = self.tensors.iter().map(|t| self.workspace(t)).collect();
        needs.sort_unstable_by(|a, b| b.cmp(a));
        needs.into_iter()
    }
}

/// A memory budget shared by threads.
pub(crate) struct Budget {
    free: Mutex<usize>,
    freed: Condvar,
}

/// Memory taken from a budget, which is returned on drop.
pub(crate) struct Room<'b> {
    budget: &'b Budget,
    bytes: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Budget {
        Budget { free: Mutex::new(bytes), freed: Condvar::new() }
    }

    /// Waits until this many bytes are free. Callers must have checked that the budget is large enough.
    pub(crate) fn take(&self, bytes: usize) -> Room<'_> {
        let mut free = self.free.lock().expect("no panic while held");
        while *free < bytes {
            free = self.freed.wait(free).expect("no panic while held");
        }
        *free -= bytes;
        Room { budget: self, bytes }
    }

    /// Takes this many bytes if they are free, for optional buffers.
    pub(crate) fn try_take(&self, bytes: usize) -> Option<Room<'_>> {
        let mut free = self.free.lock().expect("no panic while held");
        *free = free.checked_sub(bytes)?;
        Some(Room { budget: self, bytes })
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        *self.budget.free.lock().expect("no panic while held") += self.bytes;
        self.budget.freed.notify_all();
    }
}
