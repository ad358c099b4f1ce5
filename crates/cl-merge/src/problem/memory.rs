//! Problems with the memory limit.

/// A memory limit that is too low, with the required memory in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryProblem {
    /// A merge of models exceeds the limit.
    #[error(
        "{} MiB of memory are not enough: {threads} threads hold {} MiB, tensor `{tensor}` needs {} MiB; allow {} MiB or fewer threads",
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
        "{} MiB of memory are not enough: factors take {} MiB and module `{module}` {} MiB; allow {} MiB",
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
        "{} MiB of memory are not enough: the tensors beside the factors need {} MiB with these; allow {} MiB",
        mib(*allowed), mib(*needed), mib(*needed)
    )]
    BesideFactors {
        /// The memory limit.
        allowed: usize,
        /// The required memory in total.
        needed: usize,
    },
    /// Extracting a module exceeds the limit.
    #[error("{} MiB of memory are not enough: module `{module}` needs {} MiB; allow these", mib(*allowed), mib(*needed))]
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
