//! Peak memory of writing a mixture, and the number of threads that fit into a memory limit.

use cl_checkpoint::TensorSource;
use cl_merge::adapter::truncated_svd_scratch;

use crate::mix::PIECE;
use crate::plan::Source;
use crate::problem::MixProblem;
use crate::{Error, ExpertStorage, MixOptions, Plan, Problem};

/// Bytes that are not used for tensors: the program and headers.
const FIXED: usize = 32 << 20;
/// Bytes per element while a difference is computed: as read, in f32 and rounded, for both models.
const OF_DIFFERENCE: usize = 20;

impl Plan {
    /// Upper bound of the peak memory of [`mix`](crate::mix), in bytes.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] if a single thread needs more than the limit.
    pub fn peak_memory(&self, options: &MixOptions) -> Result<usize, Error> {
        Ok(FIXED + self.threads(options)? * self.thread_bytes())
    }

    /// Number of threads that write tensors at the same time.
    pub(crate) fn threads(&self, options: &MixOptions) -> Result<usize, Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let wanted = if options.threads == 0 { cores } else { options.threads.min(cores) };
        let (allowed, needed) = (options.memory, FIXED + self.thread_bytes());
        if needed > allowed {
            return Err(Error::Problems(vec![Problem::new("memory", MixProblem::Memory { allowed, needed })]));
        }
        Ok(wanted.min((allowed - FIXED) / self.thread_bytes()))
    }

    /// Peak memory of one thread, for the most expensive tensor.
    fn thread_bytes(&self) -> usize {
        let elements = |tensor: &str| self.base.info(tensor).map_or(0, |info| info.shape.iter().product::<usize>());
        let of_tensor = |source: &Source, written: usize| match source {
            Source::Deltas => 0,
            Source::TaskVectors { matrices, .. } => {
                let (all, columns) = (matrices.iter().map(|m| elements(m)).sum::<usize>(), self.hidden());
                let shape = [all / columns.max(1), columns];
                12 * written + 4 * all + OF_DIFFERENCE * all + truncated_svd_scratch(shape, 1)
            }
            Source::Router { .. } | Source::SharedGate { .. } | Source::Constant { .. } => 12 * written,
            Source::Base(_) | Source::Expert(..) | Source::Shared(..) => 12 * PIECE.min(written),
        };
        let of_tensors = self.tensors.iter().map(|t| of_tensor(&t.source, t.spec.shape.iter().product()));
        let of_delta = |shape: [usize; 2]| match self.config.expert_storage {
            ExpertStorage::LowRank(rank) => OF_DIFFERENCE * shape[0] * shape[1] + truncated_svd_scratch(shape, rank),
            _ => OF_DIFFERENCE * PIECE.max(shape[1]),
        };
        of_tensors.chain(self.deltas.iter().map(|delta| of_delta(delta.shape))).max().unwrap_or(0).max(PIECE)
    }

    fn hidden(&self) -> usize {
        self.base.info("model.embed_tokens.weight").and_then(|info| info.shape.get(1)).copied().unwrap_or(1)
    }
}
