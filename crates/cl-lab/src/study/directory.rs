//! The directory of a study, and which of its stages a process runs: several processes may run one study together.
//!
//! ```text
//! study.json         the configuration
//! .study.lock        shared by all processes that run it
//! .locks/<id>        held alone by the process that runs a stage, and shared by those that run stages made from its result
//! ```
//!
//! The locks are the operating system's, so that they end with a process, whatever ends it.

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

/// How often, and after which pause, a lock is tried that another process has.
const TRIES: usize = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// Makes a directory, which must be empty or belong to a study, that of this study, for this process alone.
pub(super) fn take_alone(config: &StudyConfig, out: &Path) -> Result<File, LabError> {
    let lock = open(out)?;
    if is_held(lock.try_lock()) {
        return refuse(out, OutputProblem::Busy);
    }
    write_marker(config, out)?;
    Ok(lock)
}

/// As [`take_alone`], but together with other processes that run the same configuration.
pub(super) fn take_shared(config: &StudyConfig, out: &Path) -> Result<File, LabError> {
    let lock = open(out)?;
    let mut problem = OutputProblem::Busy;
    for _ in 0..TRIES {
        if !is_held(lock.try_lock_shared()) {
            if read_file(&out.join(MARKER), MAX_CONFIG).is_ok_and(|saved| saved == marker(config)) {
                return Ok(lock);
            }
            problem = OutputProblem::OtherStudy;
            // Released first: how a lock is changed into another differs between systems.
            let _ = lock.unlock();
            if !is_held(lock.try_lock()) {
                write_marker(config, out)?;
                let _ = lock.unlock();
                continue;
            }
        }
        // Another process may have it for the moment of writing its configuration.
        thread::sleep(PAUSE);
    }
    refuse(out, problem)
}

/// Opens the file of the lock in a directory that is empty or belongs to a study.
fn open(out: &Path) -> Result<File, LabError> {
    std::fs::create_dir_all(out).map_err(LabError::io(out))?;
    if !is_study(&out.join(MARKER)) {
        for entry in std::fs::read_dir(out).map_err(LabError::io(out))? {
            let name = entry.map_err(LabError::io(out))?.file_name().to_string_lossy().into_owned();
            // What a kill right at the start leaves.
            if name != LOCK && !(name.starts_with(".study.json.") && name.ends_with(".part")) {
                return refuse(out, OutputProblem::NotEmpty { what: "study", marker: MARKER });
            }
        }
    }
    let path = out.join(LOCK);
    File::options().create(true).append(true).open(&path).map_err(LabError::io(&path))
}

/// Whether a file marks a study's directory, and is not another program's file of this name.
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

/// Whether a lock is another's. Some file systems have no locks; work then continues without one.
fn is_held(outcome: Result<(), TryLockError>) -> bool {
    matches!(outcome, Err(TryLockError::WouldBlock))
}

/// The locks of a stage that this process runs.
pub(super) struct StageLock {
    _locks: Vec<File>,
}

impl StageLock {
    /// Locks a stage, and what it is made from. `None` if another process has one of them.
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
