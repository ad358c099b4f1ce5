//! Problems with the memory limit.

/// A memory limit that is too low, with the required memory in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryProblem {
    /// A merge of models exceeds the limit.
    #[error(
        "{} MiB of memory is not enough: {threads} threads need {} MiB, and tensor `{tensor}` another {} MiB; allow {} MiB, or use fewer threads",
        mib(*allowed), mib(*held), mib(*largest), mib(held + largest)
    )]
    Merge {
        /// The memory limit.
        allowed: usize,
        /// Number of threads.
        threads: usize,
        /// Memory for all threads, whatever tensor they work on.
        held: usize,
        /// The tensor that needs the most memory.
        tensor: String,
        /// The additional memory for this tensor.
        largest: usize,
    },
    /// Combining the modules of adapters exceeds the limit.
    #[error(
        "{} MiB of memory is not enough: all factors need {} MiB, and module `{module}` another {} MiB; allow {} MiB",
        mib(*allowed), mib(*held), mib(*largest), mib(held + largest)
    )]
    Modules {
        /// The memory limit.
        allowed: usize,
        /// Memory for all factors.
        held: usize,
        /// The module that needs the most memory.
        module: String,
        /// The additional memory for this module.
        largest: usize,
    },
    /// Combining the tensors that adapters train in addition to their factors exceeds the limit.
    #[error(
        "{} MiB of memory is not enough: the factors and the tensors stored in full need {} MiB; allow {} MiB",
        mib(*allowed), mib(*needed), mib(*needed)
    )]
    BesideFactors {
        /// The memory limit.
        allowed: usize,
        /// The required memory in total.
        needed: usize,
    },
    /// Extracting a module exceeds the limit.
    #[error("{} MiB of memory is not enough: module `{module}` needs {} MiB", mib(*allowed), mib(*needed))]
    Extract {
        /// The memory limit.
        allowed: usize,
        /// The module that needs the most memory.
        module: String,
        /// The required memory in total.
        needed: usize,
    },
}

fn mib(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20)
}
