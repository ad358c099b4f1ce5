//! Run directories. Each belongs to one configuration and its inputs, and is written by one process at a time.

use std::fs::{File, TryLockError};
use std::path::Path;

use cl_checkpoint::files::write_file;
use cl_checkpoint::refuse_overlap;
use serde::Serialize;

use crate::LabError;
use crate::problem::{ConfigProblem, OutputProblem};

/// Serializes a value as TOML.
///
/// # Errors
/// Returns [`LabError::Config`] if TOML cannot represent it, for example a seed above 2⁶³ - 1.
pub(crate) fn to_toml(path: &Path, value: &impl Serialize) -> Result<String, LabError> {
    toml::to_string(value).map_err(|e| LabError::config(path, ConfigProblem::NotToml(Box::new(e))))
}

/// A run directory, and what it must contain for a run to be resumed in it.
pub(crate) struct RunDir<'a> {
    /// The directory.
    pub(crate) out: &'a Path,
    /// Kind of run: `sequence`, `run` or `study`.
    pub(crate) what: &'static str,
    /// Name of the settings file. It is written last, so a directory that contains it is a run directory.
    pub(crate) marker: &'static str,
    /// Content of the settings file.
    pub(crate) settings: &'a str,
    /// Other files with the hashes of the inputs, as pairs of name and content; one hash per line.
    pub(crate) sources: &'a [(&'a str, String)],
    /// Models, adapters and data that the run reads, each with its role. The run directory must not overlap with them.
    pub(crate) inputs: &'a [(&'a str, &'a Path)],
    /// Whether to resume an unfinished run.
    pub(crate) resume: bool,
}

impl RunDir<'_> {
    /// Creates the directory, or checks that it belongs to this run. Returns the lock, to be held until the run ends.
    pub(crate) fn open(&self) -> Result<File, LabError> {
        let marker = self.out.join(self.marker);
        if !marker.exists() {
            self.create()?;
        } else if self.has_failed_at_once()? {
            let _lock = self.lock(&marker)?;
            self.create()?;
        } else if !self.resume {
            return self.refuse(OutputProblem::NotResumed);
        } else {
            self.compare(&read(&marker)?)?;
        }
        self.lock(&marker)
    }

    fn create(&self) -> Result<(), LabError> {
        if !self.is_unused()? {
            return self.refuse(OutputProblem::NotEmpty { what: self.what, marker: self.marker });
        }
        refuse_overlap(self.out, self.inputs)?;
        std::fs::create_dir_all(self.out).map_err(LabError::io(self.out))?;
        for (name, content) in self.sources {
            write_file(&self.out.join(name), content.as_bytes())?;
        }
        Ok(write_file(&self.out.join(self.marker), self.settings.as_bytes())?)
    }

    /// Whether an earlier run wrote only the files of [`RunDir::create`], so that there is nothing to resume. A
    /// directory with a file of the marker's name, but without the other files, was not written by a run.
    fn has_failed_at_once(&self) -> Result<bool, LabError> {
        let complete = self.sources.iter().all(|(name, _)| self.out.join(name).exists());
        Ok(complete && self.is_unused()?)
    }

    /// Whether the directory does not exist, or contains no files except those of [`RunDir::create`].
    fn is_unused(&self) -> Result<bool, LabError> {
        if !self.out.exists() {
            return Ok(true);
        }
        for entry in std::fs::read_dir(self.out).map_err(LabError::io(self.out))? {
            let name = entry.map_err(LabError::io(self.out))?.file_name();
            if !self.is_ours(&name.to_string_lossy()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the name is that of a file written by [`RunDir::create`], or of its temporary file after a kill.
    fn is_ours(&self, name: &str) -> bool {
        let mut ours = self.sources.iter().map(|s| s.0).chain([self.marker]);
        ours.any(|file| name == file || (name.starts_with(&format!(".{file}.")) && name.ends_with(".part")))
    }

    fn compare(&self, settings: &str) -> Result<(), LabError> {
        let (saved, now) = (of_the_run(settings), of_the_run(self.settings));
        if saved != now {
            let owned = |line: Option<&str>| line.map(str::to_owned);
            let (saved, now) = (owned(first_missing(&saved, &now)), owned(first_missing(&now, &saved)));
            return self.refuse(OutputProblem::OtherSettings { what: self.what, saved, now });
        }
        for (name, content) in self.sources {
            let path = self.out.join(name);
            let saved = read(&path)?;
            if let Some((_, source)) = first_missing(content, &saved).and_then(|line| line.split_once("  ")) {
                return self.refuse(OutputProblem::InputChanged { what: self.what, input: source.to_owned() });
            }
        }
        Ok(())
    }

    fn lock(&self, marker: &Path) -> Result<File, LabError> {
        let file = File::open(marker).map_err(LabError::io(marker))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => self.refuse(OutputProblem::Busy),
            // Some file systems do not support locks; the run then continues without one.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
        }
    }

    fn refuse<T>(&self, problem: OutputProblem) -> Result<T, LabError> {
        Err(LabError::Output { path: self.out.to_owned(), problem })
    }
}

/// Removes a directory, starting with its manifest, so that a killed process leaves nothing that looks complete.
pub(crate) fn discard(dir: &Path) -> Result<(), LabError> {
    remove(dir).map_err(LabError::io(dir))
}

/// [`discard`] with the error of the file system.
pub(crate) fn remove(dir: &Path) -> std::io::Result<()> {
    let marker = dir.join("manifest.json");
    if marker.exists() {
        std::fs::remove_file(&marker)?;
    }
    if dir.exists() { std::fs::remove_dir_all(dir) } else { Ok(()) }
}

/// Settings that determine how processes share a training run. They may change when the run is resumed.
const OF_THE_RANKS: [&str; 2] = ["zero_stage", "sharded_checkpoints"];

/// Returns the settings without those in [`OF_THE_RANKS`].
fn of_the_run(settings: &str) -> String {
    let of_the_ranks = |line: &str| line.split_once(" = ").is_some_and(|(key, _)| OF_THE_RANKS.contains(&key));
    settings.split_inclusive('\n').filter(|line| !of_the_ranks(line)).collect()
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

    fn run_dir<'a>(out: &'a Path, settings: &'a str, sources: &'a [(&'a str, String)], resume: bool) -> RunDir<'a> {
        RunDir { out, what: "run", marker: "config.toml", settings, sources, inputs: &[], resume }
    }

    fn refused(dir: &RunDir<'_>) -> String {
        dir.open().unwrap_err().to_string()
    }

    #[test]
    fn a_directory_belongs_to_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b");
        let sources = [("data.blake3", "77  d.json\n".to_owned())];
        drop(run_dir(&out, "r = 1\n", &sources, false).open().unwrap());
        std::fs::write(out.join("log.jsonl"), "").unwrap();
        assert!(refused(&run_dir(&out, "r = 1\n", &sources, false)).contains("--resume"));
        drop(run_dir(&out, "r = 1\n", &sources, true).open().unwrap());
        drop(run_dir(&out, "zero_stage = 3\nsharded_checkpoints = true\nr = 1\n", &sources, true).open().unwrap());
        let message = refused(&run_dir(&out, "r = 2\n", &sources, true));
        assert!(message.contains("it has `r = 1`, this run has `r = 2`"), "{message}");
        let message = refused(&run_dir(&out, "r = 1\nq = 3\n", &sources, true));
        assert!(message.contains("this run has `q = 3`, it does not"), "{message}");
        let changed = [("data.blake3", "78  d.json\n".to_owned())];
        assert!(refused(&run_dir(&out, "r = 1\n", &changed, true)).contains("d.json has changed"));
    }

    #[test]
    fn a_run_that_failed_before_its_first_result_starts_anew() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["77", "78"].map(|hash| [("data.blake3", format!("{hash}  d.json\n"))]);
        let running = run_dir(folder.path(), "r = 1\n", &first, false).open().unwrap();
        assert!(refused(&run_dir(folder.path(), "r = 2\n", &second, false)).contains("another process"));
        drop(running);
        drop(run_dir(folder.path(), "r = 2\n", &second, false).open().unwrap());
        let content = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!((content("config.toml").as_str(), content("data.blake3").as_str()), ("r = 2\n", "78  d.json\n"));
    }

    #[test]
    fn a_configuration_that_somebody_put_into_the_output_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.toml");
        std::fs::write(&config, "r = 1 # chosen by hand\n").unwrap();
        let sources = [("base.blake3", "7  m\n".to_owned()), ("data.blake3", "77  d.json\n".to_owned())];
        assert!(refused(&run_dir(folder.path(), "r = 1\n", &sources, false)).contains("is not empty"));
        assert_eq!(std::fs::read_to_string(&config).unwrap(), "r = 1 # chosen by hand\n");
    }

    #[test]
    fn a_run_stays_apart_from_what_it_is_made_from() {
        let folder = tempfile::tempdir().unwrap();
        let (model, data) = (folder.path().join("base"), folder.path().join("data"));
        std::fs::create_dir_all(&model).unwrap();
        std::fs::create_dir_all(&data).unwrap();
        let inputs = [("the base model", model.as_path()), ("the data", data.as_path())];
        for (out, expected) in [(&model, "is the base model"), (&data.join("run"), "lies inside the data")] {
            let message = refused(&RunDir { inputs: &inputs, ..run_dir(out, "", &[], false) });
            assert!(message.contains(expected), "{message}");
        }
        assert!(!data.join("run").exists());
        RunDir { inputs: &inputs, ..run_dir(&folder.path().join("run"), "", &[], false) }.open().unwrap();
    }

    #[test]
    fn another_process_at_work_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let first = run_dir(folder.path(), "", &[], true).open().unwrap();
        assert!(refused(&run_dir(folder.path(), "", &[], true)).contains("another process"));
        drop(first);
        run_dir(folder.path(), "", &[], true).open().unwrap();
    }

    #[test]
    fn what_a_kill_at_the_start_left_is_no_obstacle_and_other_files_are() {
        let folder = tempfile::tempdir().unwrap();
        let sources = [("base.blake3", "7  m\n".to_owned())];
        for name in ["base.blake3", ".config.toml.a1b2c3.part"] {
            std::fs::write(folder.path().join(name), "half").unwrap();
        }
        drop(run_dir(folder.path(), "", &sources, false).open().unwrap());
        std::fs::remove_file(folder.path().join("config.toml")).unwrap();
        std::fs::write(folder.path().join("notes.txt"), "").unwrap();
        for resume in [false, true] {
            assert!(refused(&run_dir(folder.path(), "", &sources, resume)).contains("is not the directory of a run"));
        }
    }
}
