//! Why a run cannot begin or go on, as facts in fields; a [`LabError`](crate::LabError) adds where.

/// Why a directory cannot be that of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputProblem {
    /// It holds the run already, and resuming was not requested.
    #[error("is not empty; add --resume to continue the run in it, or choose another --out")]
    NotResumed,
    /// It holds something else.
    #[error("is not empty and is not the directory of a {what} (no {marker}); choose another --out")]
    NotEmpty {
        /// What is run: `sequence`, `run` or `study`.
        what: &'static str,
        /// The file by which a directory of this kind is known.
        marker: &'static str,
    },
    /// It holds a run with other settings.
    #[error("holds a {what} with a different configuration{}; choose another --out", difference(saved.as_deref(), now.as_deref()))]
    OtherSettings {
        /// What is run: `sequence`, `run` or `study`.
        what: &'static str,
        /// The first saved setting that this run does not have.
        saved: Option<String>,
        /// The first setting of this run that is not saved.
        now: Option<String>,
    },
    /// An input is not the one that the run began with.
    #[error("{input} has changed since the {what} started; choose another --out")]
    InputChanged {
        /// What is run: `sequence`, `run` or `study`.
        what: &'static str,
        /// The input.
        input: String,
    },
    /// It holds the tiny study with other settings.
    #[error("holds the tiny study with other settings (tiny.json); choose another --out")]
    OtherTinyStudy,
    /// Another process is running in it.
    #[error("another process is using it; wait for that to finish, or choose another --out")]
    Busy,
}

/// What is wrong with an argument of `--set`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetProblem {
    /// It has no value.
    #[error("expected key=value")]
    NoValue,
    /// It has no key.
    #[error("expected a key before =")]
    NoKey,
    /// Its number does not fit into TOML.
    #[error("the number is outside the range of TOML, -2⁶³ to 2⁶³ - 1")]
    Range,
    /// It sets a key below one that is not a table.
    #[error("a part of the key is not a table")]
    NotATable,
}

/// Why the name of a task cannot be that of its predictions file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskNameProblem {
    /// It is a path without a last component.
    #[error("not a valid directory name")]
    NoFileName,
    /// The task is listed twice.
    #[error("listed twice; expected each task once")]
    Twice,
    /// Another task has the same file.
    #[error("its predictions file would be the same as that of `{other}`; rename one of them")]
    SameFile {
        /// The other task.
        other: String,
    },
}

fn difference(saved: Option<&str>, now: Option<&str>) -> String {
    match (saved, now) {
        (Some(saved), Some(now)) => format!(": it has `{saved}`, this run has `{now}`"),
        (Some(saved), None) => format!(": it has `{saved}`, this run does not"),
        (None, Some(now)) => format!(": this run has `{now}`, it does not"),
        (None, None) => String::new(),
    }
}
