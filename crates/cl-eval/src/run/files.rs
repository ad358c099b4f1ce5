//! Files of a run: written atomically, or appended to under a lock.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cl_checkpoint::files::write_file;

use crate::error::Error;

/// Writes a file atomically. Creates its directory.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    make_parent(path)?;
    Ok(write_file(path, bytes)?)
}

pub(super) fn make_parent(path: &Path) -> Result<(), Error> {
    let Some(parent) = path.parent() else { return Ok(()) };
    if let Some(file) = parent.ancestors().find(|p| p.exists()).filter(|p| !p.is_dir()) {
        return Err(Error::NoDirectory { path: file.to_owned(), file: path.to_owned() });
    }
    std::fs::create_dir_all(parent).map_err(|source| Error::Io { path: parent.to_owned(), source })
}

/// Opens a log of answers for appending, locked as long as it is open.
pub(super) fn lock_log(path: &Path) -> Result<File, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    loop {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path: path.to_owned() }),
            // A file system without locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        // The previous holder may have replaced the file, in which case this lock is void.
        let same_file = |there: &Metadata, open: &Metadata| (there.dev(), there.ino()) == (open.dev(), open.ino());
        let open = file.metadata().map_err(io)?;
        if std::fs::metadata(path).is_ok_and(|there| same_file(&there, &open)) {
            return Ok(file);
        }
    }
}

/// Removes temporary files `.NAME.RANDOM.part` that killed processes left next to a file. Call it under the file's
/// lock.
pub(super) fn remove_leftovers(path: &Path) {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return };
    let prefix = format!(".{}.", name.to_string_lossy());
    let random = |file: &str| {
        let middle = file.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".part"));
        middle.is_some_and(|m| !m.is_empty() && m.bytes().all(|b| b.is_ascii_alphanumeric()))
    };
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if random(&entry.file_name().to_string_lossy()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
