use cl_checkpoint::Interrupt;

/// Options of a merge.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// Memory limit in bytes.
    pub memory: usize,
    /// Number of threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Maximum number of tensor bytes per file.
    pub max_shard_size: u64,
    /// Whether to replace an existing output.
    pub overwrite: bool,
    /// Whether to record hashes of the input files in the manifest. Inputs with a manifest of this project already have
    /// a hash.
    pub hash_inputs: bool,
    /// Whether to allow NaN and infinities in tensors that are copied unchanged. Merged values must be finite in any
    /// case.
    pub allow_non_finite: bool,
    /// Stop request.
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

pub(crate) fn threads(options: &MergeOptions) -> usize {
    match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => at_most(threads),
    }
}

/// Limits the number of threads to 1,024, more than any machine has cores. Results do not depend on it, and starting a
/// hundred thousand threads takes minutes.
pub(crate) fn at_most(threads: usize) -> usize {
    threads.min(1024)
}
