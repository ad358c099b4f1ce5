//! Differences between Unix and Windows: positioned reads and writes, file identity, special files, permissions,
//! syncing.

use std::fs::{self, File};
use std::io;
use std::path::Path;

pub(crate) use system::{read_exact_at, special_file, write_all_at};

/// Identifies a file on this computer as long as it exists, independently of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    volume: u64,
    file: u64,
}

impl FileId {
    /// Returns the identity of an open file.
    pub(crate) fn of(file: &File) -> io::Result<FileId> {
        system::id(file)
    }

    /// Returns the identity of the file at a path. Symbolic links are followed.
    pub(crate) fn at(path: &Path) -> io::Result<FileId> {
        system::id_at(path)
    }
}

/// Creates temporary files with the permissions of any new file; the crate `tempfile` makes them private by default.
pub(crate) fn temporary_files() -> tempfile::Builder<'static, 'static> {
    #[allow(unused_mut)] // Windows has no permissions to set here
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // minus the umask
    builder
}

/// Copies a file, with its permissions on Unix.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    // On Windows, a read-only file could neither be synced nor removed.
    #[cfg(windows)]
    {
        let mut permissions = fs::metadata(to)?.permissions();
        if permissions.readonly() {
            permissions.set_readonly(false);
            fs::set_permissions(to, permissions)?;
        }
    }
    Ok(())
}

/// Exchanges two paths on the same file system in one step. Returns whether it did: not every system can.
pub(crate) fn exchange(one: &Path, other: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (one, other);
        false
    }
}

/// Raises the number of files that this process may have open to the most that the system allows, for models of many
/// files. Most systems start with 1,024. Does nothing if that fails, and on Windows, which has no such limit.
pub fn raise_file_limit() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// Syncs a file to disk.
pub(crate) fn sync_file(path: &Path) -> io::Result<()> {
    // Windows only flushes handles that allow writing.
    File::options().read(true).write(cfg!(windows)).open(path)?.sync_all()
}

/// Syncs the entries of a directory to disk. Windows has no such call, since NTFS writes renames to its journal.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    if cfg!(windows) { Ok(()) } else { File::open(path)?.sync_all() }
}

#[cfg(unix)]
mod system {
    use std::fs::{File, Metadata};
    use std::io;
    use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
    use std::path::Path;

    use super::FileId;

    /// Fills a buffer from a position in a file. Threads may share the file.
    pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        file.read_exact_at(buffer, offset)
    }

    /// Writes all bytes to a position in a file. Threads may share the file.
    pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    pub(super) fn id(file: &File) -> io::Result<FileId> {
        file.metadata().map(id_in)
    }

    pub(super) fn id_at(path: &Path) -> io::Result<FileId> {
        std::fs::metadata(path).map(id_in)
    }

    fn id_in(metadata: Metadata) -> FileId {
        FileId { volume: metadata.dev(), file: metadata.ino() }
    }

    /// Returns the kind of file at a path if it is not a regular file. Nothing is opened, because opening a FIFO waits
    /// for a writer.
    pub(crate) fn special_file(path: &Path) -> io::Result<Option<&'static str>> {
        let kind = std::fs::metadata(path)?.file_type();
        Ok(match kind {
            _ if kind.is_file() => None,
            _ if kind.is_dir() => Some("a directory"),
            _ if kind.is_fifo() => Some("a FIFO"),
            _ if kind.is_socket() => Some("a socket"),
            _ => Some("a device"),
        })
    }
}

#[cfg(windows)]
mod system {
    use std::fs::File;
    use std::io::{self, ErrorKind};
    use std::os::windows::fs::FileExt;
    use std::path::Path;

    use winapi_util::{AsHandleRef, Handle, file};

    use super::FileId;

    /// Fills a buffer from a position in a file. Threads may share the file if none of them relies on its cursor.
    pub(crate) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match file.seek_read(buffer, offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes all bytes to a position in a file. Threads may share the file if none of them relies on its cursor.
    pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match file.seek_write(bytes, offset) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    bytes = &bytes[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn id(file: &File) -> io::Result<FileId> {
        id_of(file)
    }

    pub(super) fn id_at(path: &Path) -> io::Result<FileId> {
        id_of(Handle::from_path_any(path)?)
    }

    fn id_of(handle: impl AsHandleRef) -> io::Result<FileId> {
        let information = file::information(handle)?;
        Ok(FileId { volume: information.volume_serial_number(), file: information.file_index() })
    }

    /// Returns the kind of file at a path if it is not a regular file. Devices such as `NUL` have no metadata, so it is
    /// opened.
    pub(crate) fn special_file(path: &Path) -> io::Result<Option<&'static str>> {
        let handle = Handle::from_path_any(path)?;
        let kind = file::typ(&handle)?;
        Ok(match kind {
            _ if kind.is_pipe() => Some("a pipe"),
            _ if !kind.is_disk() => Some("a device"),
            _ if std::fs::metadata(path)?.is_dir() => Some("a directory"),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_a_file_by_positions() {
        let file = tempfile::tempfile().unwrap();
        let part = |i: usize| vec![i as u8 + 1; 4096];
        std::thread::scope(|scope| {
            for i in (0..8).rev() {
                let file = &file;
                scope.spawn(move || write_all_at(file, &part(i), (i * 4096) as u64).unwrap());
            }
        });
        std::thread::scope(|scope| {
            for i in 0..8 {
                let file = &file;
                scope.spawn(move || {
                    let mut read = vec![0; 4096];
                    read_exact_at(file, &mut read, (i * 4096) as u64).unwrap();
                    assert_eq!(read, part(i));
                });
            }
        });
        let beyond = read_exact_at(&file, &mut [0; 2], 8 * 4096 - 1).unwrap_err();
        assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_file_keeps_its_identity_when_renamed_and_another_in_its_place_has_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        let file = File::create(&old).unwrap();
        let id = FileId::of(&file).unwrap();
        assert_eq!(FileId::at(&old).unwrap(), id);
        fs::rename(&old, &new).unwrap();
        fs::write(&old, "another").unwrap();
        assert_eq!(FileId::at(&new).unwrap(), id);
        assert_ne!(FileId::at(&old).unwrap(), id);
        FileId::at(folder.path()).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn directories_are_exchanged() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(one.join("file"), "1").unwrap();
        if exchange(&one, &other) {
            assert!(!one.join("file").exists() && other.join("file").exists());
        }
        assert!(!exchange(&one, &folder.path().join("missing")));
    }

    #[test]
    fn a_copy_of_a_read_only_file_can_be_synced_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, "content").unwrap();
        let mut permissions = fs::metadata(&from).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&from, permissions).unwrap();
        copy(&from, &to).unwrap();
        sync_file(&to).unwrap();
        sync_directory(folder.path()).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "content");
        fs::remove_file(&to).unwrap();
    }
}
