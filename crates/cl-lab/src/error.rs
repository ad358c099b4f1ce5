use std::path::{Path, PathBuf};

/// Why a study cannot run or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A configuration that does not parse or makes no sense.
    #[error("{path}: {message}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Rounds of a sequence that make no sense.
    #[error("{0}")]
    Rounds(String),
    /// A study that makes no sense.
    #[error("the study's configuration: {0}")]
    Study(String),
    /// Stages of a study that failed; what others made stands.
    #[error("{} of the study's stages failed; what the others made stands, and the same command goes on:{}", .0.len(), lines(.0))]
    Stages(Vec<crate::StageError>),
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
    /// A file in the place of a model directory.
    #[error("{path}: is a file; a model is a directory with config.json (`cl import-gguf` makes one of a GGUF file)")]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// A directory that is neither a model nor an adapter.
    #[error("{path}: holds neither a model (config.json) nor an adapter (adapter_config.json)")]
    NothingToCheck {
        /// The directory.
        path: PathBuf,
    },
    /// A model that was replaced or edited while it was in use.
    #[error(
        "{path}: has changed since the run took it up, so what was made of it cannot be said to be made of either; nothing \
         was published. Put the old file back and add --resume, or start anew with another --out"
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Something that an earlier process of the run finished and that is not what it wrote any more.
    #[error("{path}: {what}; restore it, or remove {dir} to have it made again", path = .path.display(), dir = .dir.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it differs.
        what: &'static str,
        /// The directory that it belongs to.
        dir: PathBuf,
    },
    /// The run was asked to stop between two stages.
    #[error("stopped; what is finished stands: the same command with --resume goes on from there")]
    Interrupted,
    /// A file that differs from what the manifest beside it says.
    #[error("{path}: {what}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// How it differs.
        what: &'static str,
    },
    /// A tokenizer whose tokens the model has no embeddings for.
    #[error("{path}: the tokenizer has {tokens} tokens, the embedding only {rows} rows")]
    Vocabulary {
        /// The model directory.
        path: PathBuf,
        /// Tokens of the tokenizer.
        tokens: usize,
        /// Rows of the embedding.
        rows: i64,
    },
    /// A task whose name cannot be that of its file of predictions.
    #[error("task `{name}`: {message}")]
    TaskName {
        /// Name of the task.
        name: String,
        /// What is wrong and how to go on.
        message: String,
    },
    /// Answers so long that the model would not see the question.
    #[error(
        "task `{task}`: {max_new_tokens} new tokens leave no room for a prompt in the model's {positions} positions; lower \
         max_new_tokens"
    )]
    NoRoom {
        /// Name of the task.
        task: String,
        /// Most tokens of an answer.
        max_new_tokens: usize,
        /// Longest sequence of the model.
        positions: usize,
    },
    /// Several things at once, each of which would stop a run.
    #[error("{} problems found before the start:{}", .0.len(), indented(.0))]
    Problems(Vec<LabError>),
    /// The operating system's answer.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
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
    /// A row that cannot be turned into tokens.
    #[error("{path}: {source}", path = .path.display())]
    Rows {
        /// The file.
        path: PathBuf,
        /// Which row, and why.
        source: Box<cl_data::Error>,
    },
    /// Adapters.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// Folding.
    #[error(transparent)]
    Merge(#[from] cl_merge::Error),
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

fn lines(failed: &[crate::StageError]) -> String {
    failed.iter().map(|stage| format!("\n  {stage}")).collect()
}

fn indented(problems: &[LabError]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl LabError {
    /// Whether the run was asked to stop, and did.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, LabError::Interrupted | LabError::Train(cl_train::TrainError::Interrupted { .. }))
    }

    pub(crate) fn data(path: &Path) -> impl FnOnce(cl_data::Error) -> LabError {
        let path = path.to_owned();
        move |source| match source {
            cl_data::Error::Example { .. } => LabError::Rows { path, source: Box::new(source) },
            other => other.into(),
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> LabError {
        let path = path.to_owned();
        move |source| LabError::Io { path, source }
    }
}
