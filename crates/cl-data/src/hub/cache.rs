//! The hub's disk cache.
//!
//! Layout: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>: `refs/<revision>` holds a commit,
//! `snapshots/<commit>/<file>` are links to `blobs/<etag>`. In addition, `.listing/<commit>.json` lists the commit's
//! files, so that a partially downloaded split is noticed when offline.

use std::fs;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, MAX_TOKENIZER, read_file, read_text, write_file};

use super::HubError;
use crate::Error;

/// The cache folder of a data set.
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, repo: &str) -> RepoCache {
        let name = format!("datasets--{}", repo.replace('/', "--"));
        RepoCache { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The last known commit of a revision.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let text = read_text(&self.folder.join("refs").join(revision), MAX_CONFIG).ok();
        let commit = text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        commit.or_else(|| self.snapshot(revision).is_dir().then(|| revision.to_owned()))
    }

    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<(), Error> {
        if revision == commit { Ok(()) } else { write(&self.folder.join("refs").join(revision), commit.as_bytes()) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Creates the folder of blobs.
    pub(super) fn prepare(&self) -> Result<(), HubError> {
        let folder = self.blob("");
        fs::create_dir_all(&folder).map_err(|source| HubError::Cache { path: folder, source })
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The lock of a blob, shared with Python's clients.
    pub(super) fn lock(&self, etag: &str) -> Result<fs::File, Error> {
        let path = self.locks.join(format!("{etag}.lock"));
        let io = |source| Error::Io { path: path.clone(), source };
        fs::create_dir_all(&self.locks).map_err(io)?;
        let file = fs::File::options().create(true).append(true).open(&path).map_err(io)?;
        file.lock().map_err(io)?;
        Ok(file)
    }

    pub(super) fn set_listing(&self, commit: &str, files: &[String]) -> Result<(), Error> {
        let path = self.listing_path(commit);
        if path.is_file() {
            return Ok(());
        }
        write(&path, serde_json::to_string(files).unwrap_or_default().as_bytes())
    }

    /// The files of a commit, and whether the list is complete: it is if this client has asked the hub; otherwise it is
    /// what the cache contains.
    pub(super) fn listing(&self, commit: &str) -> (Vec<String>, bool) {
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
    pub(super) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<PathBuf, Error> {
        let path = self.snapshot(commit).join(file);
        let io = |source| Error::Io { path: path.clone(), source };
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

#[cfg(unix)]
fn link(_: &Path, relative: &str, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, path)
}

/// Links require privileges on Windows; like Python's client, move the file in that case.
#[cfg(not(unix))]
fn link(blob: &Path, _: &str, path: &Path) -> std::io::Result<()> {
    fs::rename(blob, path)
}

/// Writes a file, and creates its folders.
fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|source| Error::Io { path: path.to_owned(), source })?;
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

/// Names come from configurations and from a server, and must not lead out of the cache.
pub(super) fn check_name(name: &str, expected: &'static str) -> Result<(), HubError> {
    let good = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
    if name.split('/').all(good) { Ok(()) } else { Err(HubError::Name { name: name.to_owned(), expected }) }
}
