use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{MAX_TOKENIZER, open_file, read_file};
use crate::platform::{read_exact_at, sync_file};
use crate::{Error, HubSnapshot};

/// `manifest.json`: the files of a directory and what they were made from. It is written last, so its presence means
/// that the directory is complete. It contains no times or host names, so equal runs produce equal bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `model`, `adapter`, `train_state`, `scores`, …
    pub kind: String,
    /// The program that wrote it.
    pub tool: Tool,
    /// The inputs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
    /// The resolved settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
    /// All other files of the directory, by relative path.
    #[serde(default)]
    pub files: BTreeMap<String, FileEntry>,
}

/// A program and its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
}

/// An input of the directory's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// `base`, `adapter`, `data`, …
    pub role: String,
    /// Its path, or `organization/name@commit` if it is in the Hub's cache.
    pub path: String,
    /// Hexadecimal blake3 hash of its content; `None` for large inputs that were not hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
}

/// Size and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// Hexadecimal blake3 hash.
    pub blake3: String,
}

/// A difference between a manifest and its directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestProblem {
    /// The file is listed but missing.
    Missing(PathBuf),
    /// The content differs from the manifest.
    Changed(PathBuf),
    /// The file exists but is not listed.
    Unlisted(PathBuf),
}

const NAME: &str = "manifest.json";

impl Manifest {
    /// Creates an empty manifest, with the version of this workspace.
    pub fn new(kind: &str) -> Manifest {
        Manifest {
            kind: kind.to_owned(),
            tool: Tool { name: "cl".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() },
            sources: Vec::new(),
            config: None,
            files: BTreeMap::new(),
        }
    }

    /// Adds an input.
    pub fn with_source(mut self, role: &str, path: &Path, blake3: impl Into<Option<String>>) -> Manifest {
        let blake3 = blake3.into();
        self.sources.push(Source { role: role.to_owned(), path: HubSnapshot::source_name(path), blake3 });
        self
    }

    /// Adds the settings.
    pub fn with_config(mut self, config: Value) -> Manifest {
        self.config = Some(config);
        self
    }

    /// Reads the manifest of a directory.
    ///
    /// # Errors
    /// Returns [`Error::NotFound`] if there is none, and [`Error::Json`] if it is invalid.
    pub fn read(dir: &Path) -> Result<Manifest, Error> {
        let path = dir.join(NAME);
        if !path.exists() {
            return Err(Error::NotFound {
                path,
                hint: "the directory is incomplete, or was not written by this program",
            });
        }
        let text = read_file(&path, MAX_TOKENIZER)?;
        serde_json::from_slice(&text).map_err(Error::json(&path))
    }

    /// Compares a directory with its manifest, file by file.
    ///
    /// # Errors
    /// Returns the same errors as [`Manifest::read`], and [`Error::Io`] if a file cannot be read.
    pub fn verify(dir: &Path) -> Result<Vec<ManifestProblem>, Error> {
        Manifest::verify_share(dir, 0, 1)
    }

    /// Like [`Manifest::verify`], but compares only one of `shares` equal shares of the listed files, numbered from 0,
    /// so that several processes can divide the work.
    ///
    /// # Errors
    /// Returns the same errors as [`Manifest::verify`].
    ///
    /// # Panics
    /// Panics if `shares` is 0.
    pub fn verify_share(dir: &Path, share: usize, shares: usize) -> Result<Vec<ManifestProblem>, Error> {
        let manifest = Manifest::read(dir)?;
        let mut problems = Vec::new();
        let present = files(dir)?;
        for (name, entry) in manifest.files.iter().skip(share).step_by(shares) {
            let path = dir.join(name);
            if !present.contains(&path) {
                problems.push(ManifestProblem::Missing(path));
            } else if hash_file(&path)? != *entry {
                problems.push(ManifestProblem::Changed(path));
            }
        }
        for path in present {
            let name = inside(dir, &path);
            if name != NAME && !manifest.files.contains_key(&name) {
                problems.push(ManifestProblem::Unlisted(path));
            }
        }
        Ok(problems)
    }

    /// Returns a hash over the names and hashes of all files, which is equal for equal content.
    pub fn content_hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, entry) in &self.files {
            hasher.update(name.as_bytes()).update(b"\0").update(entry.blake3.as_bytes()).update(b"\n");
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Adds every file of the directory that is not listed yet. Listed files were already hashed when they were
    /// written.
    pub(crate) fn hash_files(&mut self, dir: &Path) -> Result<(), Error> {
        for path in files(dir)? {
            let name = inside(dir, &path);
            if name != NAME && !self.files.contains_key(&name) {
                self.files.insert(name, hash_file(&path)?);
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(NAME);
        let mut text = serde_json::to_vec_pretty(self).map_err(Error::json(&path))?;
        text.push(b'\n');
        fs::write(&path, text).map_err(Error::io(&path))?;
        sync_file(&path).map_err(Error::io(&path))
    }
}

/// Number of bytes that a thread reads and hashes at a time: a power of two, so that it is a subtree of blake3's tree,
/// and small enough for a core's cache.
const SUBTREE: u64 = 512 << 10;

/// Computes size and blake3 hash of a file, in parallel for large files. The file is read, not memory-mapped, because
/// the pages of a map would stay resident until the end.
///
/// # Errors
/// Returns [`Error::Io`] if reading fails, or if the file becomes shorter in the meantime.
pub fn hash_file(path: &Path) -> Result<FileEntry, Error> {
    let file = open_file(path)?;
    let metadata = file.metadata().map_err(Error::io(path))?;
    let bytes = metadata.len();
    if metadata.is_file() && bytes > SUBTREE {
        let blake3 = hash_in_parallel(&file, bytes).map_err(Error::io(path))?;
        return Ok(FileEntry { bytes, blake3: blake3.to_hex().to_string() });
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&file).map_err(Error::io(path))?;
    Ok(FileEntry { bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
}

/// Hashes subtrees in parallel and joins them, as in section 2.1 of the blake3 specification.
fn hash_in_parallel(file: &fs::File, bytes: u64) -> std::io::Result<blake3::Hash> {
    let subtree = |i: u64| {
        let start = i * SUBTREE;
        let mut buffer = vec![0; (bytes - start).min(SUBTREE) as usize];
        read_exact_at(file, &mut buffer, start)?;
        Ok(blake3::Hasher::new().set_input_offset(start).update(&buffer).finalize_non_root())
    };
    let subtrees: std::io::Result<Vec<_>> = (0..bytes.div_ceil(SUBTREE)).into_par_iter().map(subtree).collect();
    let subtrees = subtrees?;
    let half = left_subtree_len(bytes);
    let (left, right) = subtrees.split_at((half / SUBTREE) as usize);
    Ok(merge_subtrees_root(&join(left, half), &join(right, bytes - half), Mode::Hash))
}

/// Returns the chaining value of a tree of these subtrees, which cover `bytes` bytes.
fn join(subtrees: &[ChainingValue], bytes: u64) -> ChainingValue {
    if let [single] = subtrees {
        return *single;
    }
    let half = left_subtree_len(bytes);
    let (left, right) = subtrees.split_at((half / SUBTREE) as usize);
    merge_subtrees_non_root(&join(left, half), &join(right, bytes - half), Mode::Hash)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let path = entry.path();
        // Links to directories are not followed, because they may lead outside or form a cycle.
        if entry.file_type().map_err(Error::io(&path))?.is_dir() {
            out.extend(files(&path)?);
        } else {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

/// Returns the path of a file relative to its directory, with `/` on all systems.
pub(crate) fn inside(dir: &Path, path: &Path) -> String {
    let relative = path.strip_prefix(dir).unwrap_or(path).to_string_lossy();
    if cfg!(windows) { relative.replace('\\', "/") } else { relative.into_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_hashed_in_parallel_has_the_hash_of_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content: Vec<u8> = (0..5 * SUBTREE + 1234).map(|i| ((i * i) >> 7) as u8).collect();
        let half = SUBTREE / 2;
        for bytes in
            [0, 1, SUBTREE - 1, SUBTREE, SUBTREE + 1, 2 * SUBTREE, 3 * SUBTREE, 4 * SUBTREE + half, 5 * SUBTREE + 1234]
        {
            let content = &content[..bytes as usize];
            fs::write(&path, content).unwrap();
            let expected = FileEntry { bytes, blake3: blake3::hash(content).to_hex().to_string() };
            assert_eq!(hash_file(&path).unwrap(), expected, "{bytes}");
        }
    }

    #[test]
    fn verify_names_every_difference() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("d");
        let out = crate::OutputDir::create(&dir, false).unwrap();
        for name in ["a", "b", "c"] {
            fs::write(out.path().join(name), name).unwrap();
        }
        out.finish(Manifest::new("test")).unwrap();
        assert_eq!(Manifest::verify(&dir).unwrap(), []);
        fs::write(dir.join("a"), "other").unwrap();
        fs::remove_file(dir.join("b")).unwrap();
        fs::write(dir.join("d"), "new").unwrap();
        let expected = [
            ManifestProblem::Changed(dir.join("a")),
            ManifestProblem::Missing(dir.join("b")),
            ManifestProblem::Unlisted(dir.join("d")),
        ];
        assert_eq!(Manifest::verify(&dir).unwrap(), expected);
    }
}
