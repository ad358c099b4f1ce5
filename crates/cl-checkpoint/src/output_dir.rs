use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::{Error, Manifest};

/// An output directory that appears whole or not at all.
///
/// Files are written to a temporary sibling, `.NAME.PID.part`. [`OutputDir::finish`] writes `manifest.json` last, syncs, and
/// renames. Dropped without that, the temporary is removed; what a killed process left is removed by the next
/// [`OutputDir::create`] for the same output.
pub struct OutputDir {
    target: PathBuf,
    part: PathBuf,
    made: Vec<PathBuf>, // folders above `target` that were made for it, innermost first
    overwrite: bool,
    finished: bool,
}

/// Temporaries that this process is writing to. One that bears this process' id but is not among them was left by an earlier
/// process with the same id.
static LIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

impl OutputDir {
    /// Makes the temporary directory for `target`.
    ///
    /// # Errors
    /// [`Error::Exists`] when `target` is there and `overwrite` is false; [`Error::Plan`] when it has no name or another part
    /// of this process is writing it; [`Error::Io`].
    pub fn create(target: &Path, overwrite: bool) -> Result<OutputDir, Error> {
        // `..` and a trailing slash would hide the name that the temporary is called after.
        let absolute = std::path::absolute(target).map_err(Error::io(target))?;
        let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
            return Err(Error::Plan { path: target.to_owned(), message: "not the name of a directory".to_owned() });
        };
        if !overwrite && occupied(&absolute) {
            return Err(Error::Exists { path: target.to_owned() });
        }
        let name = name.to_string_lossy();
        let part = parent.join(format!(".{name}.{}.part", std::process::id()));
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        if live.contains(&part) {
            let message = "is being written by another part of this process".to_owned();
            return Err(Error::Plan { path: target.to_owned(), message });
        }
        let made = parent.ancestors().take_while(|p| !p.exists()).map(Path::to_owned).collect();
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        remove_stale(parent, &name)?;
        fs::create_dir(&part).map_err(Error::io(&part))?;
        live.insert(part.clone());
        Ok(OutputDir { target: absolute, part, made, overwrite, finished: false })
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        &self.part
    }

    /// Where the directory will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Hashes every file into `manifest`, writes it last, and moves the directory into place.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Exists`] when somebody made `target` meanwhile.
    pub fn finish(mut self, mut manifest: Manifest) -> Result<(), Error> {
        // The disk writes while the cores hash.
        std::thread::scope(|scope| {
            let synced = scope.spawn(|| sync_all(&self.part));
            manifest.hash_files(&self.part)?;
            synced.join().expect("syncing does not panic")
        })?;
        manifest.write(&self.part)?;
        sync(&self.part)?;
        if occupied(&self.target) && !self.overwrite {
            return Err(Error::Exists { path: self.target.clone() });
        }
        let old = self.part.with_extension("old");
        let replaced = self.target.symlink_metadata().is_ok();
        if replaced {
            fs::rename(&self.target, &old).map_err(Error::io(&self.target))?;
        }
        if let Err(source) = fs::rename(&self.part, &self.target) {
            if replaced {
                // Put back what was there; the error to report is the first one.
                let _ = fs::rename(&old, &self.target);
            }
            return Err(Error::Io { path: self.target.clone(), source });
        }
        self.finished = true;
        if let Some(parent) = self.target.parent() {
            sync(parent)?;
        }
        if replaced {
            remove(&old)?;
        }
        Ok(())
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        // A lock that a panic has poisoned still guards the same set.
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.finished {
            // Nothing sensible can be done about a failure here; the next create tries again.
            let _ = fs::remove_dir_all(&self.part);
            // Those that are not empty hold something else by now.
            let _ = self.made.iter().try_for_each(fs::remove_dir);
        }
        live.remove(&self.part);
    }
}

/// Whether this names a file directly in a directory, wherever the name came from.
pub(crate) fn is_file_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|last| last == name) && !name.contains(['\\', '\0'])
}

/// Removes a directory, a file, or a symbolic link but not what it leads to.
fn remove(path: &Path) -> Result<(), Error> {
    let is_dir = path.symlink_metadata().is_ok_and(|m| m.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(Error::io(path))
}

/// An empty directory may be written into; anything else is in the way.
fn occupied(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.symlink_metadata().is_ok(),
    }
}

/// Removes temporaries of processes that are gone, and puts back an old output that was being replaced by one.
fn remove_stale(parent: &Path, name: &str) -> Result<(), Error> {
    for entry in fs::read_dir(parent).map_err(Error::io(parent))? {
        let path = entry.map_err(Error::io(parent))?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(rest) = file.strip_prefix(&format!(".{name}.")) else { continue };
        let Some((pid, kind)) = rest.split_once('.') else { continue };
        let Ok(pid) = pid.parse::<u32>() else { continue };
        if pid != std::process::id() && Path::new(&format!("/proc/{pid}")).exists() {
            continue;
        }
        let target = parent.join(name);
        if kind == "old" && target.symlink_metadata().is_err() {
            fs::rename(&path, &target).map_err(Error::io(&path))?;
        } else if kind == "part" || kind == "old" {
            remove(&path)?;
        }
    }
    Ok(())
}

fn sync_all(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.is_dir() {
            sync_all(&path)?;
        }
        sync(&path)?;
    }
    Ok(())
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn dropped_without_finish_nothing_stays() {
        let folder = tempfile::tempdir().unwrap();
        let out = OutputDir::create(&folder.path().join("o"), false).unwrap();
        fs::write(out.path().join("x"), "x").unwrap();
        drop(out);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn what_a_killed_process_left_is_cleaned_up_and_an_old_output_put_back() {
        let folder = tempfile::tempdir().unwrap();
        // No process has the highest number a pid can have plus one.
        fs::create_dir(folder.path().join(".o.4194305.part")).unwrap();
        fs::create_dir(folder.path().join(".o.4194305.old")).unwrap();
        fs::write(folder.path().join(".o.4194305.old/kept"), "k").unwrap();
        let out = OutputDir::create(&folder.path().join("o"), true).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("o/kept")).unwrap(), "k");
        fs::write(out.path().join("new"), "n").unwrap();
        out.finish(Manifest::new("test")).unwrap();
        assert_eq!(names(folder.path()), ["o"]);
        assert_eq!(names(&folder.path().join("o")), ["manifest.json", "new"]);
    }

    #[test]
    fn an_existing_output_is_kept_unless_asked() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("o"), "a file").unwrap();
        assert!(matches!(OutputDir::create(&folder.path().join("o"), false), Err(Error::Exists { .. })));
        fs::create_dir(folder.path().join("empty")).unwrap();
        OutputDir::create(&folder.path().join("empty"), false).unwrap().finish(Manifest::new("t")).unwrap();
        assert_eq!(names(&folder.path().join("empty")), ["manifest.json"]);
    }
}
