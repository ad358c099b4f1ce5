use std::path::{Path, PathBuf};

/// Why a study cannot run or go on.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A configuration that does not parse or makes no sense.
    #[error("{path}: {message}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// `--set` without a key, or with a value that is no TOML.
    #[error("--set {text}: {message}")]
    Set {
        /// What was given.
        text: String,
        /// What is wrong.
        message: String,
    },
    /// The output belongs to another study, or was not asked to be continued.
    #[error("{path}: {message}")]
    Output {
        /// The directory.
        path: PathBuf,
        /// What is wrong and how to go on.
        message: String,
    },
    /// The operating system's answer.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// Files of models and adapters.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// Examples and tokenizers.
    #[error(transparent)]
    Data(#[from] cl_data::Error),
    /// Adapters.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// Models.
    #[error(transparent)]
    Model(#[from] cl_model::ModelError),
    /// Training.
    #[error(transparent)]
    Train(#[from] cl_train::TrainError),
    /// Scoring.
    #[error(transparent)]
    Eval(#[from] cl_eval::Error),
    /// libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

impl LabError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> LabError {
        let path = path.to_owned();
        move |source| LabError::Io { path, source }
    }
}

/// Writes a small file whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), LabError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let part = path.with_file_name(format!(".{name}.part"));
    std::fs::write(&part, content).map_err(LabError::io(&part))?;
    std::fs::rename(&part, path).map_err(LabError::io(path))
}
