//! Memory that is not enough.

/// How much would be needed, in bytes, and what for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryProblem {
    /// A merge of models.
    #[error(
        "{} MiB of memory are not enough: {threads} threads hold {} MiB, tensor `{tensor}` needs {} MiB; allow {} MiB or fewer threads",
        mib(*allowed), mib(*held), mib(*largest), mib(held + largest)
    )]
    Merge {
        /// Allowed.
        allowed: usize,
        /// Number of threads.
        threads: usize,
        /// What these hold, whatever they work on.
        held: usize,
        /// The tensor that needs most.
        tensor: String,
        /// What it needs on top.
        largest: usize,
    },
    /// The modules of adapters that are combined.
    #[error(
        "{} MiB of memory are not enough: factors take {} MiB and module `{module}` {} MiB; allow {} MiB",
        mib(*allowed), mib(*held), mib(*largest), mib(held + largest)
    )]
    Modules {
        /// Allowed.
        allowed: usize,
        /// What all factors take.
        held: usize,
        /// The module that needs most.
        module: String,
        /// What it needs on top.
        largest: usize,
    },
    /// What adapters that are combined train beside their factors.
    #[error(
        "{} MiB of memory are not enough: the tensors beside the factors need {} MiB with these; allow {} MiB",
        mib(*allowed), mib(*needed), mib(*needed)
    )]
    BesideFactors {
        /// Allowed.
        allowed: usize,
        /// Needed in all.
        needed: usize,
    },
    /// A module that is extracted.
    #[error("{} MiB of memory are not enough: module `{module}` needs {} MiB; allow these", mib(*allowed), mib(*needed))]
    Extract {
        /// Allowed.
        allowed: usize,
        /// The module that needs most.
        module: String,
        /// Needed in all.
        needed: usize,
    },
}

fn mib(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20)
}
