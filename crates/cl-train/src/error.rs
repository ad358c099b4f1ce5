use std::path::PathBuf;

use crate::problem::StateProblem;

/// Errors of fine-tuning.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting is invalid.
    #[error("{key} = {value}: expected {expected}")]
    Config {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What is expected.
        expected: &'static str,
    },
    /// There is nothing to train on.
    #[error("nothing to train on: none of the {examples} examples has a token that the loss covers")]
    NoData {
        /// Number of examples.
        examples: usize,
    },
    /// There is nothing to evaluate on.
    #[error("[validation]: none of the {examples} validation examples has a token that the loss covers")]
    NoValidationData {
        /// Number of validation examples.
        examples: usize,
    },
    /// A step has no supervised token.
    #[error(
        "step {step}: none of its {rows} examples has a token that the loss covers; remove such examples, which \
         `cl check` lists, or increase micro_batch_size"
    )]
    NoTarget {
        /// The step, from 1.
        step: u64,
        /// Number of its examples.
        rows: usize,
    },
    /// The loss or the gradient is NaN or infinite.
    #[error(
        "step {step}: {what} is {value}; the last checkpoint is kept. Lower learning_rate or weight_decay, or try \
         `precision = \"f32\"`; `cl check` reports such values in the model itself"
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// `loss` or `grad_norm`.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// A weight is NaN or infinite after an update.
    #[error(
        "step {step}: `{tensor}` has NaN or infinite values after the update, which was not saved. Lower learning_rate or \
         weight_decay and run again; with save_steps, --resume continues from the last checkpoint"
    )]
    NotFiniteWeight {
        /// The step, from 1.
        step: u64,
        /// The first such tensor.
        tensor: String,
    },
    /// A stop was requested.
    #[error(
        "stopped after step {step} of {total_steps}; a checkpoint is saved, and the same command with --resume continues"
    )]
    Interrupted {
        /// The last completed step.
        step: u64,
        /// Number of steps of the round.
        total_steps: u64,
    },
    /// The run is to be finished with the weights of its last checkpoint, but has none.
    #[error(
        "{path}: contains no checkpoint, so there is nothing to finish; use --resume instead of --finish to start or \
         continue the run"
    )]
    NoCheckpoint {
        /// Output directory of the run.
        path: PathBuf,
    },
    /// A checkpoint belongs to another run, or is damaged.
    #[error("{path}: the checkpoint does not match this run: {problem}; remove the directory to restart the round")]
    State {
        /// Directory of the checkpoint.
        path: PathBuf,
        /// What differs.
        problem: StateProblem,
    },
    /// With `sharded_checkpoints`, a rank does not see the files that rank 0 writes.
    #[error(
        "{path}: files written by rank 0 are not visible to all processes; with sharded_checkpoints, the output \
         directory must be on a shared file system"
    )]
    NotShared {
        /// The directory.
        path: PathBuf,
    },
    /// The ranks could not establish the process group.
    #[error(
        "rank {rank} of {world_size}: could not connect to the other ranks at {place} ({source}); check that all of them were \
         started with the same MASTER_ADDR and MASTER_PORT, and that this address can be reached from their machines"
    )]
    Join {
        /// Rank of this process.
        rank: usize,
        /// Number of ranks.
        world_size: usize,
        /// Address and port of the store.
        place: String,
        /// libtorch's message.
        r#source: Box<cl_torch::TorchError>,
    },
    /// Another rank exited, or did not answer in time.
    #[error(
        "rank {rank} of {world_size}: another rank has exited or does not respond ({source}). If it has exited, see \
         its output for the reason; if all ranks report this error, the network failed. With save_steps, --resume \
         continues from the last checkpoint, with any number of ranks"
    )]
    RankLost {
        /// Rank of this process.
        rank: usize,
        /// Number of ranks.
        world_size: usize,
        /// libtorch's message.
        r#source: cl_torch::TorchError,
    },
    /// A rank uses another program, configuration or data than rank 0.
    #[error(
        "rank {rank}: {what} differs from rank 0's; start all ranks with the same configuration, and with copies of the \
         same model and data"
    )]
    RankDiffers {
        /// Rank of this process.
        rank: usize,
        /// What differs.
        what: &'static str,
    },
    /// A file cannot be read or written.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        r#source: std::io::Error,
    },
    /// An error of checkpoint files.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] cl_model::ModelError),
    /// An error of adapters.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// An error of libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

impl TrainError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> TrainError {
        let path = path.to_owned();
        move |source| TrainError::Io { path, source }
    }
}
