//! Reading and writing single files: only regular files, with a size limit, and written atomically.
//!
//! All files named by a user are read and written with this module: a FIFO does not block a command, `/dev/zero` does
//! not exhaust memory, and after a kill or with a full disk, either the old or the new content remains.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::Error;
use crate::parser_message::lists_choices;
pub use crate::parser_message::{in_plain_words, of_json_line, of_yaml, similar};
use crate::platform::{FileId, special_file, sync_directory, temporary_files};

/// Maximum size in bytes of a configuration: `config.json`, `adapter_config.json`, and TOML and YAML files of the
/// commands.
pub const MAX_CONFIG: u64 = 16 << 20;
/// Maximum size in bytes of a tokenizer, shard index, template or manifest. The largest published tokenizers have 35
/// MB.
pub const MAX_TOKENIZER: u64 = 256 << 20;

/// Whether this is the name of a file directly in a directory.
pub(crate) fn is_file_name(name: &str) -> bool {
    // On Windows, a colon starts the name of an alternate stream of a file.
    let stream = cfg!(windows) && name.contains(':');
    Path::new(name).file_name().is_some_and(|last| last == name) && !name.contains(['\\', '\0']) && !stream
}

/// Opens a regular file for reading.
///
/// # Errors
/// Returns [`Error::NotAFile`] for directories, FIFOs, sockets and devices, which are not opened, and [`Error::Io`] if
/// opening fails.
pub fn open_file(path: &Path) -> Result<File, Error> {
    match special_file(path).map_err(Error::io(path))? {
        Some(what) => Err(Error::NotAFile { path: path.to_owned(), what }),
        None => File::open(path).map_err(Error::io(path)),
    }
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// Returns [`Error::NotAFile`] if it is not a regular file, [`Error::TooLarge`] if it exceeds the limit, and
/// [`Error::Io`] if reading fails.
///
/// ```
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("config.json");
/// cl_checkpoint::files::write_file(&path, b"{}")?;
/// assert_eq!(cl_checkpoint::files::read_file(&path, 16)?, b"{}");
/// let error = cl_checkpoint::files::read_file(&path, 1).unwrap_err();
/// assert!(error.to_string().contains("more than 1 bytes"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let mut content = Vec::new();
    // Read one byte more, to detect a file that has grown beyond the limit.
    open_file(path)?.take(limit.saturating_add(1)).read_to_end(&mut content).map_err(Error::io(path))?;
    if content.len() as u64 > limit {
        return Err(Error::TooLarge { path: path.to_owned(), limit });
    }
    Ok(content)
}

/// Reads a regular UTF-8 file of at most `limit` bytes.
///
/// # Errors
/// Returns the same errors as [`read_file`], and [`Error::NotUtf8`] with the first invalid byte.
pub fn read_text(path: &Path, limit: u64) -> Result<String, Error> {
    String::from_utf8(read_file(path, limit)?)
        .map_err(|e| Error::NotUtf8 { path: path.to_owned(), offset: e.utf8_error().valid_up_to() })
}

/// Writes a file atomically: to a temporary file in the same directory, which is synced and renamed to `path`.
///
/// # Errors
/// Returns [`Error::Io`] if writing fails; the old content is then unchanged.
pub fn write_file(path: &Path, content: &[u8]) -> Result<(), Error> {
    write_file_with(path, |file| file.write_all(content))
}

/// Like [`write_file`], with a function that writes the content.
///
/// # Errors
/// Returns [`Error::Io`] if writing fails or `write` returns an error.
pub fn write_file_with(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), Error> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy());
    remove_leftovers(parent, &prefix);
    let mut part = temporary(parent, &prefix).map_err(Error::io(path))?;
    write(part.as_file_mut()).and_then(|()| part.as_file().sync_all()).map_err(Error::io(path))?;
    let (file, part) = part.keep().map_err(|e| Error::Io { path: path.to_owned(), source: e.error })?;
    // On Windows, too, `fs::rename` replaces files that others have open; `persist` does not.
    if let Err(source) = fs::rename(&part, path) {
        drop(file);
        let _ = fs::remove_file(&part);
        return Err(Error::Io { path: path.to_owned(), source });
    }
    sync_directory(parent).map_err(Error::io(parent))
}

const PART: &str = ".part";

/// Creates a temporary file that is locked while it is open, so that it is not removed as a leftover.
fn temporary(parent: &Path, prefix: &str) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = temporary_files();
    builder.prefix(prefix).suffix(PART);
    loop {
        let part = builder.tempfile_in(parent)?;
        // On file systems without locks, leftovers are not removed.
        let _ = part.as_file().try_lock();
        // Another process may have removed the file before it was locked.
        if part.path().exists() {
            return Ok(part);
        }
    }
}

/// Removes temporary files that killed processes left for the same file.
fn remove_leftovers(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let random = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(PART));
        if random.is_some_and(|r| !r.is_empty() && r.chars().all(|c| c.is_ascii_alphanumeric()))
            && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok())
        {
            // Another process may have removed it in the meantime.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Describes an I/O error in words, without its number.
pub fn explain(error: &std::io::Error) -> String {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::NotFound => "not found".to_owned(),
        // On Windows, files that are open in another program often cannot be replaced or removed.
        ErrorKind::PermissionDenied if cfg!(windows) => "permission denied, or in use by another program".to_owned(),
        ErrorKind::PermissionDenied => "permission denied".to_owned(),
        ErrorKind::AlreadyExists => "already exists".to_owned(),
        ErrorKind::IsADirectory => "is a directory; expected a file".to_owned(),
        ErrorKind::NotADirectory => "is not a directory".to_owned(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "no space left on device".to_owned(),
        ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        ErrorKind::UnexpectedEof => "unexpected end of file; it is truncated or damaged".to_owned(),
        ErrorKind::InvalidData => "invalid data; the file is damaged, or not a text file".to_owned(),
        _ => error.to_string(),
    }
}

/// Returns an error's message with those of its causes, except for causes whose text is already contained in it. I/O
/// errors are [described in words](explain).
///
/// ```
/// use cl_checkpoint::{Error, files::with_causes};
/// let source = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
/// assert_eq!(with_causes(&Error::Io { path: "out".into(), source }), "out: already exists");
/// ```
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let (mut message, mut next) = (error.to_string(), error.source());
    while let Some(cause) = next {
        let said = cause.downcast_ref::<std::io::Error>().map_or_else(|| cause.to_string(), explain);
        if !message.contains(&said) {
            message = format!("{message}: {said}");
        }
        next = cause.source();
    }
    message
}

/// Returns a parser's message [in plain words](in_plain_words), with long lines shortened, since parsers quote the
/// invalid line regardless of its length.
///
/// ```
/// let short = cl_checkpoint::files::shorten(&"x".repeat(10_000));
/// assert!(short.len() < 300 && short.ends_with("(10000 bytes)"));
/// ```
pub fn shorten(message: &str) -> String {
    const LONGEST: usize = 200;
    let cut = |line: &str| match line.char_indices().nth(LONGEST) {
        Some(_) if lists_choices(line) => line.to_owned(),
        Some((end, _)) => format!("{} … ({} bytes)", &line[..end], line.len()),
        None => line.to_owned(),
    };
    in_plain_words(message).lines().map(cut).collect::<Vec<_>>().join("\n")
}

/// Copies a file to a new one.
///
/// # Errors
/// Returns [`Error::Io`] with `from` if reading or writing fails.
pub fn copy_file(from: &Path, to: &Path) -> Result<(), Error> {
    crate::platform::copy(from, to).map_err(Error::io(from))
}

/// Identifies the state of a file without reading it: identity (device and inode), size and modification time. A file
/// that has been overwritten, replaced or truncated has a different stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    id: FileId,
    bytes: u64,
    modified: SystemTime,
}

impl FileStamp {
    /// Returns the current stamp of a file. Symbolic links are followed.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if there is no such file, or its directory cannot be read.
    pub fn of(path: &Path) -> Result<FileStamp, Error> {
        let stamp = || {
            let metadata = fs::metadata(path)?;
            Ok(FileStamp { id: FileId::at(path)?, bytes: metadata.len(), modified: metadata.modified()? })
        };
        stamp().map_err(Error::io(path))
    }
}

impl FileStamp {
    /// Returns the stamps of several files, with their paths.
    pub(crate) fn of_all(files: Vec<PathBuf>) -> Result<Vec<(PathBuf, FileStamp)>, Error> {
        files.into_iter().map(|file| Ok((file.clone(), FileStamp::of(&file)?))).collect()
    }
}

/// Checks that all files still have the same stamps.
///
/// # Errors
/// Returns [`Error::Changed`] for the first file that has changed.
pub(crate) fn check_unchanged(stamps: &[(PathBuf, FileStamp)]) -> Result<(), Error> {
    let changed = |entry: &&(PathBuf, FileStamp)| !FileStamp::of(&entry.0).is_ok_and(|now| now == entry.1);
    match stamps.iter().find(changed) {
        Some((path, _)) => Err(Error::Changed { path: path.clone() }),
        None => Ok(()),
    }
}

/// Returns this project's cache directory, which is outside of any checkout: `CL_CACHE`, else `cl` in `XDG_CACHE_HOME`,
/// else `.cache/cl` in the home directory (`HOME`, or `USERPROFILE` on Windows). Returns `None` if none of these
/// variables is set. The directory may not exist yet.
pub fn cache_dir() -> Option<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name))
}

fn cache_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let own = || set("XDG_CACHE_HOME").map(|dir| dir.join("cl"));
    let home = || set("HOME").or_else(|| set("USERPROFILE"));
    set("CL_CACHE").or_else(own).or_else(|| home().map(|dir| dir.join(".cache").join("cl")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let message = |path: &Path| read_file(path, 100).unwrap_err().to_string();
        assert!(message(folder.path()).contains("is a directory"));
        let device = if cfg!(windows) { "NUL" } else { "/dev/zero" };
        assert!(message(Path::new(device)).contains("is a device"));
        if cfg!(unix) {
            let fifo = folder.path().join("config.json");
            assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
            assert!(message(&fifo).contains("is a FIFO"));
        }
    }

    #[test]
    fn a_file_at_the_limit_is_read_and_a_larger_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write_file(&path, b"four").unwrap();
        assert_eq!(read_file(&path, 4).unwrap(), b"four");
        assert!(matches!(read_file(&path, 3), Err(Error::TooLarge { limit: 3, .. })));
    }

    #[test]
    fn text_that_is_none_names_the_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write_file(&path, b"ab\xff").unwrap();
        assert!(matches!(read_text(&path, 10), Err(Error::NotUtf8 { offset: 2, .. })));
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write_file(&path, b"old").unwrap();
        let full = |file: &mut File| {
            file.write_all(b"half")?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        };
        assert!(write_file_with(&path, full).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_next_write_removes_what_a_killed_one_left_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(folder.path().join(".f.a1B2c3.part"), "half").unwrap();
        fs::write(folder.path().join(".f.my.notes.part"), "mine").unwrap();
        let other = temporary(folder.path(), ".f.").unwrap();
        write_file(&path, b"whole").unwrap();
        assert!(other.path().exists(), "it is being written");
        drop(other);
        let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".f.my.notes.part", "f"]);
    }

    #[test]
    fn a_stamp_changes_with_content_and_with_another_file_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "one").unwrap();
        let first = FileStamp::of(&path).unwrap();
        assert_eq!(first, FileStamp::of(&path).unwrap());
        write_file(&path, b"two").unwrap();
        let second = FileStamp::of(&path).unwrap();
        assert_ne!(first, second, "another inode");
        fs::write(&path, "longer").unwrap();
        assert_ne!(second, FileStamp::of(&path).unwrap());
    }
}
