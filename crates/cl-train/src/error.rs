use std::path::PathBuf;

/// Why a round of fine-tuning cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting outside its range.
    #[error("{key} = {value}: expected {expected}")]
    Config {
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The data makes no optimizer step.
    #[error(
        "nothing to train on: {examples} examples, none with a token to learn (in its answer, after another token)"
    )]
    NoData {
        /// How many examples there were.
        examples: usize,
    },
    /// A step would have nothing to learn from.
    #[error(
        "step {step}: none of its {rows} examples has a token to learn (in its answer, after another token); leave such \
         examples out, or raise micro_batch_size"
    )]
    NoTarget {
        /// The step, from 1.
        step: u64,
        /// How many examples it has.
        rows: usize,
    },
    /// The loss or the gradient is not a number any more.
    #[error(
        "step {step}: {what} is {value}; the last saved state is kept. Lower learning_rate or weight_decay, or try \
         `precision = \"f32\"`; `cl check` says whether the model itself holds such values"
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// `loss` or `grad_norm`.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// An update made a weight infinite or NaN.
    #[error(
        "step {step}: the update left `{tensor}` with values that are infinite or NaN; nothing of it was saved. Lower \
         learning_rate or weight_decay, and run again: with save_steps, --resume goes on from the last state before"
    )]
    NotFiniteWeight {
        /// The step, from 1.
        step: u64,
        /// The first such tensor.
        tensor: String,
    },
    /// The run was asked to stop.
    #[error(
        "stopped after step {step} of {total_steps}; its state is saved: the same command with --resume goes on from there"
    )]
    Interrupted {
        /// The last step taken.
        step: u64,
        /// Steps of the round.
        total_steps: u64,
    },
    /// A saved state belongs to another run.
    #[error("{path}: the saved state does not fit: {message}; remove the folder to start this round again")]
    State {
        /// Folder of the state.
        path: PathBuf,
        /// What differs.
        message: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Files of checkpoints.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] cl_model::ModelError),
    /// Adapters.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

impl TrainError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> TrainError {
        let path = path.to_owned();
        move |source| TrainError::Io { path, source }
    }
}
