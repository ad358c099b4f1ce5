//! The directory of a study, and the locks with which several processes share one study.
//!
//! ```text
//! study.json         the configuration
//! .study.lock        held in shared mode by all processes that run the study
//! .locks/<id>        held exclusively while a stage runs, and in shared mode while stages that use its result run
//! ```
//!
//! They are locks of the operating system, so they are released when a process ends for any reason.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::thread;
use std::time::Duration;

use cl_checkpoint::files::{MAX_CONFIG, read_file, write_file};
use serde_json::{Value, json};

use super::config::StudyConfig;
use super::graph::Stage;
use crate::LabError;
use crate::problem::OutputProblem;

const MARKER: &str = "study.json";
const LOCK: &str = ".study.lock";

/// Number of attempts to take a lock that another process holds, and the pause between them.
const TRIES: usize = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// Takes a directory, which must be empty or belong to a study, for this study and this process only.
pub(super) fn take_alone(config: &StudyConfig, out: &Path) -> Result<File, LabError> {
    let lock = open(out)?;
    if is_held(lock.try_lock()) {
        return refuse(out, OutputProblem::Busy);
    }
    write_marker(config, out)?;
    Ok(lock)
}

/// Like [`take_alone`], but shares the directory with other processes that run the same configuration.
pub(super) fn take_shared(config: &StudyConfig, out: &Path) -> Result<File, LabError> {
    let lock = open(out)?;
    let mut problem = OutputProblem::Busy;
    for _ in 0..TRIES {
        if !is_held(lock.try_lock_shared()) {
            if read_file(&out.join(MARKER), MAX_CONFIG).is_ok_and(|saved| saved == marker(config)) {
                return Ok(lock);
            }
            problem = OutputProblem::OtherStudy;
            // Release it first: converting a lock to another kind behaves differently on different systems.
            let _ = lock.unlock();
            if !is_held(lock.try_lock()) {
                write_marker(config, out)?;
                let _ = lock.unlock();
                continue;
            }
        }
        // Another process may hold the lock briefly while it writes its configuration.
        thread::sleep(PAUSE);
    }
    refuse(out, problem)
}

/// Opens the lock file of a directory that is empty or belongs to a study.
fn open(out: &Path) -> Result<File, LabError> {
    std::fs::create_dir_all(out).map_err(LabError::io(out))?;
    if !is_study(&out.join(MARKER)) {
        for entry in std::fs::read_dir(out).map_err(LabError::io(out))? {
            let name = entry.map_err(LabError::io(out))?.file_name().to_string_lossy().into_owned();
            // Files that a process killed at the very start may leave behind.
            if name != LOCK && !(name.starts_with(".study.json.") && name.ends_with(".part")) {
                return refuse(out, OutputProblem::NotEmpty { what: "study", marker: MARKER });
            }
        }
    }
    let path = out.join(LOCK);
    File::options().create(true).append(true).open(&path).map_err(LabError::io(&path))
}

/// Whether a file marks the directory of a study, and is not an unrelated file with the same name.
fn is_study(marker: &Path) -> bool {
    let value = read_file(marker, MAX_CONFIG).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    value.is_some_and(|value| value.get("cl_study").is_some())
}

fn marker(config: &StudyConfig) -> Vec<u8> {
    format!("{:#}\n", json!({"cl_study": 1, "config": config})).into_bytes()
}

fn write_marker(config: &StudyConfig, out: &Path) -> Result<(), LabError> {
    Ok(write_file(&out.join(MARKER), &marker(config))?)
}

fn refuse<T>(out: &Path, problem: OutputProblem) -> Result<T, LabError> {
    Err(LabError::Output { path: out.to_owned(), problem })
}

/// Whether another process holds a lock. Some file systems do not support locks; work then continues without one.
fn is_held(outcome: Result<(), TryLockError>) -> bool {
    matches!(outcome, Err(TryLockError::WouldBlock))
}

/// The locks of a stage that this process is running.
pub(super) struct StageLock {
    _locks: Vec<File>,
}

impl StageLock {
    /// Locks a stage exclusively, and its dependencies in shared mode. Returns `None` if another process holds one of
    /// them.
    pub(super) fn try_new<'s>(
        out: &Path,
        stage: &Stage,
        needs: impl Iterator<Item = &'s Stage>,
    ) -> Result<Option<StageLock>, LabError> {
        let own = lock_file(out, stage)?;
        if is_held(own.try_lock()) {
            return Ok(None);
        }
        let mut locks = vec![own];
        for need in needs {
            let file = lock_file(out, need)?;
            if is_held(file.try_lock_shared()) {
                return Ok(None);
            }
            locks.push(file);
        }
        Ok(Some(StageLock { _locks: locks }))
    }
}

fn lock_file(out: &Path, stage: &Stage) -> Result<File, LabError> {
    let dir = out.join(".locks");
    std::fs::create_dir_all(&dir).map_err(LabError::io(&dir))?;
    let path = dir.join(&stage.id);
    File::options().create(true).append(true).open(&path).map_err(LabError::io(&path))
}
