/// Why the name of a task cannot be used as the name of its predictions file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskNameProblem {
    /// It is a path without a file name.
    #[error("not a valid directory name")]
    NoFileName,
    /// The task is listed twice.
    #[error("listed twice; expected each task once")]
    Twice,
    /// Another task has the same predictions file.
    #[error("its predictions file would be the same as that of `{other}`; rename one of them")]
    SameFile {
        /// The other task.
        other: String,
    },
}
