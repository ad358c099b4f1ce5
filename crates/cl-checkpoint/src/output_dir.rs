use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::COMPANIONS;
use crate::lock::lock_name;
use crate::manifest::inside;
use crate::platform::{exchange, sync_directory, sync_file};
use crate::problem::{Obstacle, PlanProblem};
use crate::{Error, FileLock, Manifest};

/// An output directory that is created atomically.
///
/// Files are written to a temporary sibling directory, `.NAME.cl-RANDOM.part`, under the lock `.NAME.cl-lock`.
/// [`OutputDir::finish`] writes `manifest.json` last, syncs, and renames the directory. If it is dropped before that,
/// the temporary directory is removed. Leftovers of killed processes are removed by the next [`OutputDir::create`] for
/// the same output.
///
/// With `overwrite`, an output is replaced only if everything in it was written by this program, or is a known file of
/// a model or an adapter; see [`OutputDir::check`].
pub struct OutputDir {
    target: PathBuf,
    part: PathBuf,
    made: Vec<PathBuf>, // parent directories created for `target`, innermost first
    overwrite: bool,
    finished: bool,
    lock: Option<FileLock>,
}

impl OutputDir {
    /// Checks an output before the work starts, in the same way as [`OutputDir::create`] and [`OutputDir::finish`] do
    /// later.
    ///
    /// `inputs` are the paths from which the output is made, each with its role (`the base model`, `the data`). The
    /// output must not be, contain or be inside one of them, and must not be or contain the working directory.
    ///
    /// # Errors
    /// Returns [`Error::Overlap`] if it overlaps with an input, [`Error::Exists`] if `target` exists and `overwrite` is
    /// false, [`Error::NotReplaceable`] if it contains a file that this program would not have written, and
    /// [`Error::Plan`] if it has no name.
    pub fn check(target: &Path, overwrite: bool, inputs: &[(&str, &Path)]) -> Result<(), Error> {
        let place = resolve(target)?;
        if let Some(file) = place.ancestors().skip(1).find(|p| p.exists()).filter(|p| !p.is_dir()) {
            return Err(Error::io(file)(std::io::ErrorKind::NotADirectory.into()));
        }
        refuse_overlap(target, inputs)?;
        check_free(target, &place, overwrite)
    }

    /// Creates the temporary directory for `target`. Symbolic links are followed.
    ///
    /// # Errors
    /// Returns the same errors as [`OutputDir::check`], [`Error::Busy`] if it is already being written, and
    /// [`Error::Io`] if the directory cannot be created.
    pub fn create(target: &Path, overwrite: bool) -> Result<OutputDir, Error> {
        OutputDir::check(target, overwrite, &[])?;
        let absolute = resolve(target)?;
        let (parent, name) = parts(&absolute);
        let made = parent.ancestors().take_while(|p| !p.exists()).map(Path::to_owned).collect();
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let lock = FileLock::take(&absolute)?.ok_or_else(|| Error::Busy { path: target.to_owned() })?;
        // Without a lock, leftovers cannot be distinguished from directories that are still being written.
        if lock.is_exclusive() {
            remove_stale(parent, &name)?;
        }
        let prefix = format!(".{name}{TEMPORARY}");
        let part = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".part")
            .tempdir_in(parent)
            .map_err(Error::io(parent))?
            .keep();
        Ok(OutputDir { target: absolute, part, made, overwrite, finished: false, lock: Some(lock) })
    }

    /// Removes temporary directories that a killed process left next to `target`, and restores an output that it was
    /// replacing. Does nothing while another process is writing `target`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn clean_up(target: &Path) -> Result<(), Error> {
        let absolute = resolve(target)?;
        let (parent, name) = parts(&absolute);
        let leftover = |entry: std::io::Result<fs::DirEntry>| {
            entry.is_ok_and(|e| {
                let file = e.file_name().to_string_lossy().into_owned();
                file == lock_name(&name) || temporary_kind(&file, &name).is_some()
            })
        };
        if !fs::read_dir(parent).is_ok_and(|mut entries| entries.any(leftover)) {
            return Ok(());
        }
        match FileLock::take(&absolute)? {
            Some(lock) if lock.is_exclusive() => remove_stale(parent, &name),
            _ => Ok(()),
        }
    }

    /// Calls [`OutputDir::clean_up`] for all outputs in a folder.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn clean_up_all(folder: &Path) -> Result<(), Error> {
        let mut targets = BTreeSet::new();
        for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
            let file = entry.map_err(Error::io(folder))?.file_name().to_string_lossy().into_owned();
            let target = file.strip_prefix('.').and_then(|file| file.split_once(TEMPORARY));
            targets.extend(target.map(|(name, _)| name.to_owned()));
        }
        targets.iter().try_for_each(|name| OutputDir::clean_up(&folder.join(name)))
    }

    /// Returns the temporary directory to write to.
    pub fn path(&self) -> &Path {
        &self.part
    }

    /// Returns the final path.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Adds hashes of all files to `manifest`, writes it last, and renames the directory to its final path.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if writing fails, and [`Error::Exists`] or [`Error::NotReplaceable`] if `target` was
    /// written to in the meantime.
    pub fn finish(mut self, mut manifest: Manifest) -> Result<(), Error> {
        // Sync to disk while hashing.
        std::thread::scope(|scope| {
            let synced = scope.spawn(|| sync_all(&self.part));
            manifest.hash_files(&self.part)?;
            synced.join().expect("syncing does not panic")
        })?;
        manifest.write(&self.part)?;
        sync_directory(&self.part).map_err(Error::io(&self.part))?;
        check_free(&self.target, &self.target, self.overwrite)?;
        let old = self.put_in_place()?;
        self.finished = true;
        if let Some(parent) = self.target.parent() {
            sync_directory(parent).map_err(Error::io(parent))?;
        }
        old.map_or(Ok(()), |old| remove(&old))
    }

    /// Renames the directory to its final path. Returns where the directory that it replaces is now.
    fn put_in_place(&self) -> Result<Option<PathBuf>, Error> {
        let replaced = self.target.symlink_metadata().is_ok();
        if replaced && exchange(&self.part, &self.target) {
            return Ok(Some(self.part.clone()));
        }
        // If the process is killed between the two, the next one restores the old output.
        let old = self.part.with_extension("old");
        if replaced {
            fs::rename(&self.target, &old).map_err(Error::io(&self.target))?;
        }
        if let Err(source) = fs::rename(&self.part, &self.target) {
            if replaced {
                // Restore the old output; the first error is reported.
                let _ = fs::rename(&old, &self.target);
            }
            return Err(Error::Io { path: self.target.clone(), source });
        }
        Ok(replaced.then_some(old))
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if !self.finished {
            // A failure here is ignored; the next `create` tries again.
            let _ = fs::remove_dir_all(&self.part);
        }
        self.lock.take();
        if !self.finished {
            // Directories that are not empty are used by others.
            let _ = self.made.iter().try_for_each(fs::remove_dir);
        }
    }
}

/// The part of a temporary directory's name between the name of the output and the random part.
const TEMPORARY: &str = ".cl-";

/// Returns the absolute path of an output, without `..` and trailing slash, and with symbolic links resolved.
fn resolve(target: &Path) -> Result<PathBuf, Error> {
    let absolute = std::path::absolute(target).map_err(Error::io(target))?;
    // Without a trailing slash, with which a symbolic link would be taken for its directory.
    let absolute: PathBuf = absolute.components().collect();
    let absolute = if absolute.is_symlink() { absolute.canonicalize().unwrap_or(absolute) } else { absolute };
    if absolute.file_name().is_none() || absolute.parent().is_none() {
        return Err(Error::Plan { path: target.to_owned(), problem: Box::new(PlanProblem::NoName) });
    }
    Ok(absolute)
}

/// Returns the parent directory and name of a resolved output.
fn parts(absolute: &Path) -> (&Path, String) {
    let name = absolute.file_name().expect("resolved").to_string_lossy().into_owned();
    (absolute.parent().expect("resolved"), name)
}

/// Resolves all symbolic links of a path, as far as it exists.
fn real(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let known = absolute.ancestors().find_map(|a| Some((a, a.canonicalize().ok()?)));
    known.map_or(absolute.clone(), |(a, real)| match absolute.strip_prefix(a) {
        Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
        _ => real,
    })
}

/// Checks that an output is not one of its inputs, does not contain one and is not inside one, and that it neither is
/// nor contains the working directory.
///
/// # Errors
/// Returns [`Error::Overlap`] otherwise.
pub fn refuse_overlap(target: &Path, inputs: &[(&str, &Path)]) -> Result<(), Error> {
    refuse_inside(target, inputs)?;
    let out = real(target);
    for (role, given) in inputs {
        if real(given).starts_with(&out) {
            return overlap(target, "contains", role, given);
        }
    }
    match std::env::current_dir().map(|d| real(&d)) {
        Ok(here) if here == out => overlap(target, "is", "the working directory", &here),
        Ok(here) if here.starts_with(&out) => overlap(target, "contains", "the working directory", &here),
        _ => Ok(()),
    }
}

/// Checks that an output is not one of its inputs and not inside one.
///
/// # Errors
/// Returns [`Error::Overlap`] otherwise.
pub fn refuse_inside(target: &Path, inputs: &[(&str, &Path)]) -> Result<(), Error> {
    let out = real(target);
    for (role, given) in inputs {
        let input = real(given);
        if out == input {
            return overlap(target, "is", role, given);
        } else if out.starts_with(&input) {
            return overlap(target, "lies inside", role, given);
        }
    }
    Ok(())
}

fn overlap(target: &Path, relation: &'static str, role: &str, other: &Path) -> Result<(), Error> {
    Err(Error::Overlap { path: target.to_owned(), relation, role: role.into(), other: other.into() })
}

/// Checks that `place` is free, or contains only files that may be replaced.
fn check_free(target: &Path, place: &Path, overwrite: bool) -> Result<(), Error> {
    if !occupied(place) {
        return Ok(());
    }
    if !overwrite {
        return Err(Error::Exists { path: target.to_owned() });
    }
    match in_the_way(place)? {
        Some(obstacle) => Err(Error::NotReplaceable { path: target.to_owned(), obstacle }),
        None => Ok(()),
    }
}

/// Returns why a directory must not be replaced: the first entry that is neither in its manifest nor a known file of a
/// model or an adapter.
fn in_the_way(dir: &Path) -> Result<Option<Obstacle>, Error> {
    if !dir.is_dir() {
        return Ok(Some(if dir.is_symlink() { Obstacle::DanglingLink } else { Obstacle::File }));
    }
    let manifest = Manifest::read(dir).ok();
    let has = |name: &str| dir.join(name).is_file();
    let weights = |stem: &str| has(&format!("{stem}.safetensors")) || has(&format!("{stem}.safetensors.index.json"));
    let model = has("config.json") && weights("model");
    let adapter = has("adapter_config.json") && weights("adapter_model");
    if manifest.is_none() && !model && !adapter {
        return Ok(Some(Obstacle::Unknown));
    }
    let known = |path: &Path| {
        let inside = inside(dir, path);
        manifest.as_ref().is_some_and(|m| inside == "manifest.json" || m.files.contains_key(&inside))
            || ((model || adapter) && part_of_a_model(&inside))
    };
    let mut pending = vec![dir.to_owned()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            let path = entry.path();
            if entry.file_type().map_err(Error::io(&path))?.is_dir() {
                pending.push(path);
            } else if !known(&path) {
                return Ok(Some(Obstacle::Foreign { file: inside(dir, &path) }));
            }
        }
    }
    Ok(None)
}

/// Whether this is the name of a file of a model or an adapter, as saved by Transformers and PEFT.
fn part_of_a_model(name: &str) -> bool {
    let weights = (name.starts_with("model") || name.starts_with("adapter_model"))
        && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"));
    let other = ["config.json", "adapter_config.json", "README.md", ".gitattributes", "mergekit_config.yml"];
    weights || other.contains(&name) || COMPANIONS.contains(&name)
}

/// Removes a directory, a file, or a symbolic link (not its target).
fn remove(path: &Path) -> Result<(), Error> {
    let is_dir = path.symlink_metadata().is_ok_and(|m| m.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(Error::io(path))
}

/// Whether a path is occupied. An empty directory may be used; anything else may not.
fn occupied(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.symlink_metadata().is_ok(),
    }
}

/// Returns `part` or `old` for the name of a temporary directory of the output `name`.
fn temporary_kind(file: &str, name: &str) -> Option<&'static str> {
    let rest = file.strip_prefix(&format!(".{name}{TEMPORARY}"))?;
    let (random, kind) = rest.split_once('.')?;
    let kind = ["part", "old"].into_iter().find(|k| *k == kind)?;
    random.chars().all(|c| c.is_ascii_alphanumeric()).then_some(kind)
}

/// Removes leftover temporary directories, and restores an old output that was being replaced. The caller holds the
/// output's lock.
fn remove_stale(parent: &Path, name: &str) -> Result<(), Error> {
    for entry in fs::read_dir(parent).map_err(Error::io(parent))? {
        let path = entry.map_err(Error::io(parent))?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = parent.join(name);
        match temporary_kind(&file, name) {
            Some("old") if target.symlink_metadata().is_err() => {
                fs::rename(&path, &target).map_err(Error::io(&path))?;
            }
            Some(_) => remove(&path)?,
            None => {}
        }
    }
    Ok(())
}

fn sync_all(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.is_dir() {
            sync_all(&path)?;
            sync_directory(&path).map_err(Error::io(&path))?;
        } else {
            sync_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
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
        let o = folder.path().join("o");
        OutputDir::create(&o, false).unwrap().finish(Manifest::new("test")).unwrap();
        fs::rename(&o, folder.path().join(".o.cl-a1b2c3.old")).unwrap();
        fs::create_dir(folder.path().join(".o.cl-a1b2c3.part")).unwrap();
        fs::write(folder.path().join(".o.cl-lock"), "").unwrap();
        // Names that only look similar, and a temporary directory of another output.
        let others = [".o.mine.part", ".o.p.cl-a1b2c3.part", ".o.cl-a1.b2.part"];
        others.iter().for_each(|name| fs::write(folder.path().join(name), "").unwrap());
        let out = OutputDir::create(&o, true).unwrap();
        assert_eq!(names(&o), ["manifest.json"]);
        fs::write(out.path().join("new"), "n").unwrap();
        out.finish(Manifest::new("test")).unwrap();
        assert_eq!(names(folder.path()), [others[2], others[0], others[1], "o"]);
        assert_eq!(names(&o), ["manifest.json", "new"]);
    }

    #[test]
    fn what_is_being_written_is_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let o = folder.path().join("o");
        let first = OutputDir::create(&o, true).unwrap();
        fs::write(first.path().join("x"), "x").unwrap();
        assert!(matches!(OutputDir::create(&o, true), Err(Error::Busy { .. })));
        OutputDir::clean_up(&o).unwrap();
        first.finish(Manifest::new("test")).unwrap();
        assert_eq!(names(folder.path()), ["o"]);
    }

    #[test]
    fn only_what_is_ours_or_a_model_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let write = |dir: &str, files: &[&str]| {
            let dir = folder.path().join(dir);
            for file in files {
                fs::create_dir_all(dir.join(file).parent().unwrap()).unwrap();
                fs::write(dir.join(file), "{}").unwrap();
            }
            dir
        };
        let refused = |dir: &Path| match OutputDir::create(dir, true).map(drop) {
            Err(Error::NotReplaceable { obstacle, .. }) => obstacle.to_string(),
            other => panic!("{}: {other:?}", dir.display()),
        };
        assert!(refused(&write("thesis", &["thesis.txt"])).contains("neither"));
        assert!(refused(&write("json", &["config.json"])).contains("neither"));
        let model = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt"];
        OutputDir::create(&write("model", &model), true).unwrap();
        OutputDir::create(&write("adapter", &["adapter_config.json", "adapter_model.safetensors"]), true).unwrap();
        assert!(refused(&write("model", &["notes/a.txt"])).contains("`notes/a.txt`"));
        let ours = folder.path().join("ours");
        let out = OutputDir::create(&ours, false).unwrap();
        fs::write(out.path().join("x"), "x").unwrap();
        out.finish(Manifest::new("test")).unwrap();
        OutputDir::create(&ours, true).unwrap();
        assert!(refused(&write("ours", &["added.txt"])).contains("`added.txt`"));
        fs::write(folder.path().join("file"), "").unwrap();
        assert_eq!(refused(&folder.path().join("file")), "is a file");
    }

    #[test]
    fn an_output_stays_apart_from_its_inputs_and_from_the_working_directory() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("models/a")).unwrap();
        // Creating links requires a privilege on Windows.
        let link = if cfg!(unix) { "link" } else { "models" };
        #[cfg(unix)]
        std::os::unix::fs::symlink(path("models"), path(link)).unwrap();
        let input = path("models/a");
        let relation = |out: &Path| match OutputDir::check(out, true, &[("an input", &input)]) {
            Err(Error::Overlap { relation, .. }) => relation,
            other => panic!("{}: {other:?}", out.display()),
        };
        assert_eq!(relation(&path("models/a")), "is");
        assert_eq!(relation(&path(&format!("models/../{link}/a/"))), "is");
        assert_eq!(relation(&path("models")), "contains");
        assert_eq!(relation(&path(&format!("{link}/a/new/out"))), "lies inside");
        OutputDir::check(&path("models/b"), true, &[("an input", &input)]).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(relation(&here), "is");
        assert_eq!(relation(here.parent().unwrap()), "contains");
        assert!(matches!(OutputDir::create(Path::new("."), true).map(drop), Err(Error::Overlap { .. })));
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
