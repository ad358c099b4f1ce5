//! Directories of runs: each belongs to one configuration and to what that names, and one process at a time works in it.

use std::fs::{File, TryLockError};
use std::path::Path;

use cl_checkpoint::files::write_file;
use cl_checkpoint::refuse_overlap;

use crate::LabError;

/// What a directory of a run has to hold to be gone on with.
pub(crate) struct Claim<'a> {
    /// The directory.
    pub(crate) out: &'a Path,
    /// What is run: `sequence`, `run` or `study`.
    pub(crate) what: &'a str,
    /// File of the settings, which is written last and so marks the directory.
    pub(crate) marker: &'a str,
    /// The settings.
    pub(crate) settings: &'a str,
    /// Files beside the marker, by name and content: the hashes of what the run is made from, a line each.
    pub(crate) sources: &'a [(&'a str, String)],
    /// Models, adapters and data that it is made from, each with its role: the directory must stay apart from them.
    pub(crate) inputs: &'a [(&'a str, &'a Path)],
    /// Whether to go on with a run that was begun.
    pub(crate) resume: bool,
}

impl Claim<'_> {
    /// Makes the directory, or checks that it holds this very run. The run lasts as long as the lock that is returned.
    pub(crate) fn take(&self) -> Result<File, LabError> {
        let marker = self.out.join(self.marker);
        if !marker.exists() {
            self.begin()?;
        } else if !self.resume {
            return self.refuse("is not empty; add --resume to go on with it, or choose another --out");
        } else {
            self.compare(&read(&marker)?)?;
        }
        self.lock(&marker)
    }

    fn begin(&self) -> Result<(), LabError> {
        let entries =
            if self.out.exists() { Some(std::fs::read_dir(self.out).map_err(LabError::io(self.out))?) } else { None };
        for entry in entries.into_iter().flatten() {
            let name = entry.map_err(LabError::io(self.out))?.file_name();
            if !self.is_ours(&name.to_string_lossy()) {
                let message =
                    format!("is not empty and holds no {} ({}); choose another --out", self.what, self.marker);
                return self.refuse(&message);
            }
        }
        refuse_overlap(self.out, self.inputs)?;
        std::fs::create_dir_all(self.out).map_err(LabError::io(self.out))?;
        for (name, content) in self.sources {
            write_file(&self.out.join(name), content.as_bytes())?;
        }
        Ok(write_file(&self.out.join(self.marker), self.settings.as_bytes())?)
    }

    /// Whether a kill in [`Claim::begin`] may have left a file of this name.
    fn is_ours(&self, name: &str) -> bool {
        let mut ours = self.sources.iter().map(|s| s.0).chain([self.marker]);
        ours.any(|file| name == file || (name.starts_with(&format!(".{file}.")) && name.ends_with(".part")))
    }

    fn compare(&self, settings: &str) -> Result<(), LabError> {
        if settings != self.settings {
            let what = self.what;
            let difference = difference(settings, self.settings);
            return self
                .refuse(&format!("holds a {what} with another configuration{difference}; choose another --out"));
        }
        for (name, content) in self.sources {
            let path = self.out.join(name);
            let saved = read(&path)?;
            if let Some((_, source)) = first_missing(content, &saved).and_then(|line| line.split_once("  ")) {
                let what = self.what;
                return self.refuse(&format!("{source} has changed since the {what} was begun; choose another --out"));
            }
        }
        Ok(())
    }

    fn lock(&self, marker: &Path) -> Result<File, LabError> {
        let file = File::open(marker).map_err(LabError::io(marker))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                self.refuse("another process is writing there; wait for it, or choose another --out")
            }
            // Not every file system has locks; without one the run goes on unguarded.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
        }
    }

    fn refuse<T>(&self, message: &str) -> Result<T, LabError> {
        Err(LabError::Output { path: self.out.to_owned(), message: message.to_owned() })
    }
}

/// Removes a directory that is no longer needed, its manifest first, so that a kill leaves nothing that looks whole.
pub(crate) fn discard(dir: &Path) -> Result<(), LabError> {
    let marker = dir.join("manifest.json");
    if marker.exists() {
        std::fs::remove_file(&marker).map_err(LabError::io(&marker))?;
    }
    if dir.exists() {
        std::fs::remove_dir_all(dir).map_err(LabError::io(dir))?;
    }
    Ok(())
}

/// The first lines that only one of two texts has.
fn difference(saved: &str, now: &str) -> String {
    match (first_missing(saved, now), first_missing(now, saved)) {
        (Some(a), Some(b)) => format!(": it has `{a}`, this one `{b}`"),
        (Some(a), None) => format!(": it has `{a}`, this one has not"),
        (None, Some(b)) => format!(": this one has `{b}`, it has not"),
        (None, None) => String::new(),
    }
}

fn first_missing<'a>(lines: &'a str, other: &str) -> Option<&'a str> {
    lines.lines().find(|line| other.lines().all(|o| o != *line)).map(str::trim)
}

fn read(path: &Path) -> Result<String, LabError> {
    std::fs::read_to_string(path).map_err(LabError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim<'a>(out: &'a Path, settings: &'a str, sources: &'a [(&'a str, String)], resume: bool) -> Claim<'a> {
        Claim { out, what: "run", marker: "config.toml", settings, sources, inputs: &[], resume }
    }

    fn refused(claim: &Claim<'_>) -> String {
        claim.take().unwrap_err().to_string()
    }

    #[test]
    fn a_directory_belongs_to_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b");
        let sources = [("data.blake3", "77  d.json\n".to_owned())];
        drop(claim(&out, "r = 1\n", &sources, false).take().unwrap());
        assert!(refused(&claim(&out, "r = 1\n", &sources, false)).contains("--resume"));
        drop(claim(&out, "r = 1\n", &sources, true).take().unwrap());
        let message = refused(&claim(&out, "r = 2\n", &sources, true));
        assert!(message.contains("it has `r = 1`, this one `r = 2`"), "{message}");
        let message = refused(&claim(&out, "r = 1\nq = 3\n", &sources, true));
        assert!(message.contains("this one has `q = 3`, it has not"), "{message}");
        let changed = [("data.blake3", "78  d.json\n".to_owned())];
        assert!(refused(&claim(&out, "r = 1\n", &changed, true)).contains("d.json has changed"));
    }

    #[test]
    fn a_run_stays_apart_from_what_it_is_made_from() {
        let folder = tempfile::tempdir().unwrap();
        let (model, data) = (folder.path().join("base"), folder.path().join("data"));
        std::fs::create_dir_all(&model).unwrap();
        std::fs::create_dir_all(&data).unwrap();
        let inputs = [("the base model", model.as_path()), ("the data", data.as_path())];
        for (out, expected) in [(&model, "is the base model"), (&data.join("run"), "lies inside the data")] {
            let message = refused(&Claim { inputs: &inputs, ..claim(out, "", &[], false) });
            assert!(message.contains(expected), "{message}");
        }
        assert!(!data.join("run").exists());
        Claim { inputs: &inputs, ..claim(&folder.path().join("run"), "", &[], false) }.take().unwrap();
    }

    #[test]
    fn another_process_at_work_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let first = claim(folder.path(), "", &[], true).take().unwrap();
        assert!(refused(&claim(folder.path(), "", &[], true)).contains("another process"));
        drop(first);
        claim(folder.path(), "", &[], true).take().unwrap();
    }

    #[test]
    fn what_a_kill_at_the_start_left_is_no_obstacle_and_other_files_are() {
        let folder = tempfile::tempdir().unwrap();
        let sources = [("base.blake3", "7  m\n".to_owned())];
        for name in ["base.blake3", ".config.toml.a1b2c3.part"] {
            std::fs::write(folder.path().join(name), "half").unwrap();
        }
        drop(claim(folder.path(), "", &sources, false).take().unwrap());
        std::fs::remove_file(folder.path().join("config.toml")).unwrap();
        std::fs::write(folder.path().join("notes.txt"), "").unwrap();
        for resume in [false, true] {
            assert!(refused(&claim(folder.path(), "", &sources, resume)).contains("holds no run"));
        }
    }
}
