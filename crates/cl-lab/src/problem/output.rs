/// Why a directory cannot be used as a run directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputProblem {
    /// It already contains this run, and resuming was not requested.
    #[error("is not empty; add --resume to continue the run in it, or choose another --out")]
    NotResumed,
    /// It contains other files.
    #[error("is not empty and is not the directory of a {what} (no {marker}); choose another --out")]
    NotEmpty {
        /// Kind of run: `sequence`, `run` or `study`.
        what: &'static str,
        /// The file that identifies a directory of this kind.
        marker: &'static str,
    },
    /// It contains a run with different settings.
    #[error("contains a {what} with a different configuration{}; restore the configuration to resume it, or choose another --out", difference(saved.as_deref(), now.as_deref()))]
    OtherSettings {
        /// Kind of run: `sequence`, `run` or `study`.
        what: &'static str,
        /// The first saved setting that this run does not have.
        saved: Option<String>,
        /// The first setting of this run that was not saved.
        now: Option<String>,
    },
    /// An input has changed since the run started.
    #[error("{input} has changed since the {what} started; choose another --out")]
    InputChanged {
        /// Kind of run: `sequence`, `run` or `study`.
        what: &'static str,
        /// The input.
        input: String,
    },
    /// It contains the tiny study with different settings.
    #[error("contains the tiny study with different settings (tiny.json); choose another --out")]
    OtherTinyStudy,
    /// Another process is running a study with different settings in it.
    #[error("another process is using it with different settings; wait for it to finish, or choose another --out")]
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
