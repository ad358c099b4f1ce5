use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::Error;
use crate::platform::FileId;

/// An exclusive lock on a path, held by one process at a time until it is dropped.
///
/// The lock is on a file next to the path, `.NAME.cl-lock`, which is removed when the lock is dropped. So the path
/// itself may be missing, be a directory, or be replaced meanwhile, and others may read it. A killed process leaves the
/// file behind, but not the lock.
///
/// ```
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("answers.jsonl");
/// let lock = cl_checkpoint::FileLock::take(&path)?.expect("nobody holds it");
/// assert!(cl_checkpoint::FileLock::take(&path)?.is_none());
/// drop(lock);
/// assert!(cl_checkpoint::FileLock::take(&path)?.is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FileLock {
    path: PathBuf,
    _file: File,
    held: bool,
}

impl FileLock {
    /// Takes the lock of a path, whose directory must exist. Returns `None` if it is already held.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the lock file cannot be created.
    pub fn take(path: &Path) -> Result<Option<FileLock>, Error> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let path = path.with_file_name(lock_name(&name));
        loop {
            // Open for writing, because NFS cannot lock files that are opened read-only.
            let mut options = File::options();
            let file = options.create(true).truncate(false).write(true).open(&path).map_err(Error::io(&path))?;
            let held = match file.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(_)) => false,
            };
            // The previous holder may have removed the file between opening and locking; the lock is then invalid.
            let locked = FileId::of(&file).map_err(Error::io(&path))?;
            if FileId::at(&path).is_ok_and(|now| now == locked) {
                return Ok(Some(FileLock { path, _file: file, held }));
            }
        }
    }

    /// Whether the lock excludes others. It does not on file systems without locks.
    pub fn is_exclusive(&self) -> bool {
        self.held
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Remove the file while still holding the lock: a process that has opened it notices this and creates a new
        // one.
        let _ = fs::remove_file(&self.path);
    }
}

/// Returns the name of the lock file for a file or directory with this name.
pub(crate) fn lock_name(name: &str) -> String {
    format!(".{name}.cl-lock")
}
