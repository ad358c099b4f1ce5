use cl_checkpoint::Interrupt;

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
