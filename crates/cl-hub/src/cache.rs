//! The Hub's disk cache.
//!
//! Layout: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>: `refs/<revision>` contains a commit,
//! `snapshots/<commit>/<file>` are links to `blobs/<etag>`. In addition, `.listing/<commit>.json` lists the commit's
//! files, so that an incomplete download is detected when offline.

use std::fs;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, MAX_TOKENIZER, read_file, read_text, write_file};

use crate::{HubError, Repo};

/// The cache directory of a repository.
pub(crate) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, repo: &Repo) -> RepoCache {
        let name = format!("{}--{}", repo.kind.plural(), repo.name.replace('/', "--"));
        RepoCache { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// Returns the last known commit of a revision.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        let text = read_text(&self.folder.join("refs").join(revision), MAX_CONFIG).ok();
        let commit = text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        commit.or_else(|| self.snapshot(revision).is_dir().then(|| revision.to_owned()))
    }

    pub(crate) fn set_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit { Ok(()) } else { write(&self.folder.join("refs").join(revision), commit.as_bytes()) }
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Creates the directory of blobs.
    pub(crate) fn prepare(&self) -> Result<(), HubError> {
        let folder = self.blob("");
        fs::create_dir_all(&folder).map_err(|source| HubError::Cache { path: folder, source })
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Takes the lock of a blob, which is shared with Python's clients.
    pub(crate) fn lock(&self, etag: &str) -> Result<fs::File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let io = |source| HubError::Io { path: path.clone(), source };
        fs::create_dir_all(&self.locks).map_err(io)?;
        let file = fs::File::options().create(true).append(true).open(&path).map_err(io)?;
        file.lock().map_err(io)?;
        Ok(file)
    }

    pub(crate) fn set_listing(&self, commit: &str, files: &[String]) -> Result<(), HubError> {
        let path = self.listing_path(commit);
        if path.is_file() {
            return Ok(());
        }
        write(&path, serde_json::to_string(files).unwrap_or_default().as_bytes())
    }

    /// Returns the files of a commit, and whether the list is complete. It is complete if this client has queried the
    /// Hub; otherwise, it contains the files in the cache.
    pub(crate) fn listing(&self, commit: &str) -> (Vec<String>, bool) {
        let kept = read_file(&self.listing_path(commit), MAX_TOKENIZER)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(files) = kept {
            return (files, true);
        }
        let mut files = Vec::new();
        walk(&self.snapshot(commit), "", &mut files);
        (files, false)
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.folder.join(".listing").join(format!("{commit}.json"))
    }

    /// Links a complete blob into a snapshot.
    pub(crate) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<PathBuf, HubError> {
        let path = self.snapshot(commit).join(file);
        let io = |source| HubError::Io { path: path.clone(), source };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io)?;
        }
        if fs::symlink_metadata(&path).is_ok() {
            fs::remove_file(&path).map_err(io)?;
        }
        link(&self.blob(etag), &format!("{}blobs/{etag}", "../".repeat(2 + file.matches('/').count())), &path)
            .map_err(io)?;
        Ok(path)
    }
}

/// Links a file to its blob. If links cannot be created, as on Windows without the privilege, the snapshot gets a copy,
/// which appears atomically.
fn link(blob: &Path, relative: &str, path: &Path) -> std::io::Result<()> {
    match symlink(relative, path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(error),
        Err(_) => {
            let part = path.with_extension("cl.incomplete");
            fs::copy(blob, &part)?;
            fs::rename(&part, path)
        }
        done => done,
    }
}

#[cfg(unix)]
fn symlink(relative: &str, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, path)
}

#[cfg(windows)]
fn symlink(relative: &str, path: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(relative.replace('/', "\\"), path)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &str, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Writes a file, and creates its directories.
fn write(path: &Path, content: &[u8]) -> Result<(), HubError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|source| HubError::Io { path: path.to_owned(), source })?;
    }
    Ok(write_file(path, content)?)
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let path = entry.path();
        if path.is_dir() {
            walk(&path, &format!("{name}/"), files);
        } else if path.is_file() {
            files.push(name);
        }
    }
}
