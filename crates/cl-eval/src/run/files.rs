//! Files of a run: written atomically, or appended to under a lock.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use cl_checkpoint::FileLock;
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

/// Takes the lock of a predictions file.
pub(super) fn lock_log(path: &Path) -> Result<FileLock, Error> {
    FileLock::take(path)?.ok_or_else(|| Error::Busy { path: path.to_owned() })
}

/// Opens a predictions file for writing after its first `length` bytes; the rest is truncated. The caller holds the
/// lock.
pub(super) fn open_log(path: &Path, length: u64) -> std::io::Result<File> {
    // Not in append mode, because Windows cannot truncate through such a handle.
    let mut file = File::options().create(true).truncate(false).write(true).open(path)?;
    file.set_len(length)?;
    file.seek(SeekFrom::End(0))?;
    Ok(file)
}

/// Removes temporary files `.NAME.RANDOM.part` that killed processes left next to a file. The caller holds the file's
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
