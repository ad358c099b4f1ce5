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
    /// Another process runs a study with other settings in it.
    #[error("another process is using it with other settings; wait for that to finish, or choose another --out")]
    OtherStudy,
    /// Another process is running in it.
    #[error("another process is using it; wait for that to finish, or choose another --out")]
    Busy,
}

fn difference(saved: Option<&str>, now: Option<&str>) -> String {
    match (saved, now) {
        (Some(saved), Some(now)) => format!(": it has `{saved}`, this run has `{now}`"),
        (Some(saved), None) => format!(": it has `{saved}`, this run does not"),
        (None, Some(now)) => format!(": this run has `{now}`, it does not"),
        (None, None) => String::new(),
    }
}
