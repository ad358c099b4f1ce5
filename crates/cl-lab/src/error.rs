use std::path::{Path, PathBuf};

use crate::problem::{
    ConfigProblem, OutputProblem, RoundsProblem, RoutersProblem, SetProblem, StudyProblem, TaskNameProblem,
};

/// Error of a training run, a sequence or a study.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A configuration is invalid.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: ConfigProblem,
    },
    /// The files of a mixture of adapters are inconsistent.
    #[error("{path}: {problem}")]
    Mixture {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: cl_moe::problem::MixtureProblem,
    },
    /// A mixture of adapters was made for a different base model.
    #[error(
        "{path}: is a mixture for the base {base} ({}…), not for this model ({}…); create it again with `cl moe blend` for this \
         model",
        short(base_hash),
        short(model_hash)
    )]
    MixtureBase {
        /// The directory.
        path: PathBuf,
        /// Its base model, as named in its configuration.
        base: String,
        /// Hash of that base model.
        base_hash: String,
        /// Hash of the model.
        model_hash: String,
    },
    /// A mixture of adapters cannot be written.
    #[error("{path}: {source}")]
    WriteMixture {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        r#source: Box<cl_moe::Error>,
    },
    /// The routers of a mixture cannot be trained.
    #[error("{path}: {problem}")]
    Routers {
        /// Directory of the mixture.
        path: PathBuf,
        /// Why.
        problem: RoutersProblem,
    },
    /// The rounds of a sequence are invalid.
    #[error(transparent)]
    Rounds(#[from] RoundsProblem),
    /// The configuration of a study is invalid.
    #[error("the study's configuration: {0}")]
    Study(#[from] StudyProblem),
    /// Stages of a study failed. Results of the other stages are kept.
    #[error("{} stages of the study failed; the results of the others are kept, and the same command resumes:{}", .0.len(), lines(.0))]
    Stages(Vec<crate::StageError>),
    /// A message from another rank cannot be parsed.
    #[error("cannot parse a message from another rank; all ranks must run the same version of this program")]
    RankVersions,
    /// A study was asked to stop.
    #[error("stopped; completed stages are kept, and the same command resumes")]
    StudyInterrupted,
    /// An argument of `--set` is invalid.
    #[error("--set {text}: {problem}")]
    Set {
        /// The value.
        text: String,
        /// What is wrong.
        problem: SetProblem,
    },
    /// The output directory belongs to another run, or `--resume` is missing.
    #[error("{path}: {problem}")]
    Output {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: OutputProblem,
    },
    /// A file has plain texts, whose perplexity does not depend on the tokenizer, and other examples.
    #[error("{path}: has both plain texts and examples with prompts; divide it into two files")]
    MixedTexts {
        /// The file.
        path: PathBuf,
    },
    /// A file has no token whose likelihood could be computed.
    #[error("{path}: has no token to predict")]
    NothingToPredict {
        /// The file.
        path: PathBuf,
    },
    /// A path to a file was given instead of a model directory.
    #[error("{path}: is a file; a model is a directory with config.json (`cl import-gguf` converts a GGUF file)")]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// The directory is neither a model nor an adapter.
    #[error("{path}: contains neither a model (config.json) nor an adapter (adapter_config.json)")]
    NothingToCheck {
        /// The directory.
        path: PathBuf,
    },
    /// The base model changed during the run.
    #[error(
        "{path}: has changed since the run started, so no result was saved. Restore the old file and add --resume, or start \
         again with another --out"
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A completed part of the run has changed since it was written.
    #[error("{path}: {what}; restore it, or remove {dir} to create it again", path = .path.display(), dir = .dir.display())]
    Damaged {
        /// The changed file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// The directory to remove in order to create it again.
        dir: PathBuf,
    },
    /// A stop was requested between two stages.
    #[error("stopped; completed stages are kept, and the same command with --resume continues")]
    Interrupted,
    /// A file differs from the manifest of its directory.
    #[error("{path}: {what}")]
    Manifest {
        /// The file that differs.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// The tokenizer has more tokens than the embedding has rows.
    #[error("{path}: the tokenizer has {tokens} tokens, but the embedding has only {rows} rows")]
    Vocabulary {
        /// The model directory.
        path: PathBuf,
        /// Tokens of the tokenizer.
        tokens: usize,
        /// Rows of the embedding.
        rows: i64,
    },
    /// The name of a task cannot be used as the name of its predictions file.
    #[error("task `{name}`: {problem}")]
    TaskName {
        /// Name of the task.
        name: String,
        /// What is wrong.
        problem: TaskNameProblem,
    },
    /// The maximum answer length leaves no room for the prompt.
    #[error(
        "task `{task}`: {max_new_tokens} new tokens leave no room for a prompt in the model's context of {positions} tokens; lower \
         max_new_tokens"
    )]
    NoRoom {
        /// Name of the task.
        task: String,
        /// Maximum number of tokens of an answer.
        max_new_tokens: usize,
        /// Maximum sequence length of the model.
        positions: usize,
    },
    /// Several problems.
    #[error("{} problems:{}", .0.len(), indented(.0))]
    Problems(Vec<LabError>),
    /// An I/O error.
    #[error("{path}: {}", cl_checkpoint::files::explain(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        r#source: std::io::Error,
    },
    /// Error in a model or adapter directory.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// Error in the data or the tokenizer.
    #[error(transparent)]
    Data(Box<cl_data::Error>),
    /// A row cannot be tokenized.
    #[error("{path}: {source}", path = .path.display())]
    Rows {
        /// The file.
        path: PathBuf,
        /// The row and the reason.
        r#source: Box<cl_data::Error>,
    },
    /// Error of an adapter.
    #[error(transparent)]
    Adapter(#[from] cl_adapters::AdapterError),
    /// Error while merging.
    #[error(transparent)]
    Merge(#[from] cl_merge::Error),
    /// Error of a model.
    #[error(transparent)]
    Model(Box<cl_model::ModelError>),
    /// Error during training.
    #[error(transparent)]
    Train(Box<cl_train::TrainError>),
    /// Error during scoring.
    #[error(transparent)]
    Eval(Box<cl_eval::Error>),
    /// Error while writing a report.
    #[error(transparent)]
    Report(#[from] cl_report::Error),
    /// Error of libtorch.
    #[error(transparent)]
    Torch(#[from] cl_torch::TorchError),
}

impl From<cl_data::Error> for LabError {
    fn from(error: cl_data::Error) -> LabError {
        LabError::Data(Box::new(error))
    }
}

impl From<cl_model::ModelError> for LabError {
    fn from(error: cl_model::ModelError) -> LabError {
        LabError::Model(Box::new(error))
    }
}

impl From<cl_train::TrainError> for LabError {
    fn from(error: cl_train::TrainError) -> LabError {
        LabError::Train(Box::new(error))
    }
}

impl From<cl_eval::Error> for LabError {
    fn from(error: cl_eval::Error) -> LabError {
        LabError::Eval(Box::new(error))
    }
}

/// Shortens a hash to a prefix long enough to distinguish two. The text comes from a file and may be anything.
fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

fn lines(failed: &[crate::StageError]) -> String {
    failed.iter().map(|stage| format!("\n  {stage}")).collect()
}

fn indented(problems: &[LabError]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl LabError {
    /// Whether the run stopped because a stop was requested.
    pub fn is_interrupted(&self) -> bool {
        match self {
            LabError::Interrupted | LabError::StudyInterrupted => true,
            LabError::Train(error) => matches!(**error, cl_train::TrainError::Interrupted { .. }),
            LabError::Eval(error) => matches!(**error, cl_eval::Error::Interrupted),
            LabError::Merge(error) => matches!(error, cl_merge::Error::Interrupted),
            _ => false,
        }
    }

    pub(crate) fn data(path: &Path) -> impl FnOnce(cl_data::Error) -> LabError {
        let path = path.to_owned();
        move |source| match source {
            cl_data::Error::Example { .. } => LabError::Rows { path, source: Box::new(source) },
            other => other.into(),
        }
    }

    /// A problem in a configuration file.
    pub(crate) fn config(path: &Path, problem: impl Into<ConfigProblem>) -> LabError {
        LabError::Config { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> LabError {
        let path = path.to_owned();
        move |source| LabError::Io { path, source }
    }
}
