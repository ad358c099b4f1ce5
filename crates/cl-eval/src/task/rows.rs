//! Finds the rows of a task, in local files or on the Hub.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cl_data::{DatasetRef, Hub, Row, RowFile, read_rows};
use serde_json::{Value, json};

use crate::error::Error;

/// Returns the directories in which a task's files are searched: the data directory, its parent, and the directories
/// `lm-eval` and `trace` in either.
///
/// ```
/// let homes = cl_eval::task_homes(std::path::Path::new("data"));
/// assert!(homes.contains(&"data/trace".into()) && homes.contains(&"data/../lm-eval".into()));
/// ```
pub fn task_homes(dir: &Path) -> Vec<PathBuf> {
    let homes = ["", "..", "lm-eval", "../lm-eval", "trace", "../trace"];
    homes.into_iter().map(|home| if home.is_empty() { dir.to_owned() } else { dir.join(home) }).collect()
}

/// File extensions tried for each candidate.
const EXTENSIONS: [&str; 6] = ["jsonl", "json", "jsonl.gz", "json.gz", "parquet", "parquet.gz"];

/// A row and its location, for error messages.
pub(crate) struct Document {
    pub(crate) path: PathBuf,
    pub(crate) index: usize,
    pub(crate) row: Row,
}

/// Rows and their origin.
#[derive(Clone)]
pub(crate) struct Rows {
    /// The file, or the first file of a data set.
    pub(crate) path: PathBuf,
    pub(crate) file: Rc<RowFile>,
    fetched: Option<Fetched>,
}

/// Origin of rows from the Hub, to be saved with results.
#[derive(Clone)]
struct Fetched {
    dataset: DatasetRef,
    commit: Option<String>,
    paths: Vec<PathBuf>,
}

impl Rows {
    pub(crate) fn settings(&self) -> Value {
        let hash = &self.file.hash;
        let Some(Fetched { dataset: DatasetRef { repo, config, split, .. }, commit, paths }) = &self.fetched else {
            return json!({ "path": self.path, "blake3": hash });
        };
        json!({
            "repo": repo, "config": config, "split": split, "revision": commit, "paths": paths, "blake3": hash,
        })
    }
}

/// The directories to search, the Hub if allowed, and the files read so far.
pub(crate) struct Library<'a> {
    homes: Vec<PathBuf>,
    hub: Option<&'a Hub>,
    read: HashMap<PathBuf, Rc<RowFile>>,
}

impl<'a> Library<'a> {
    /// Creates a library. `own` is the directory of the task's description, which is searched first.
    pub(crate) fn new(dir: &Path, own: Option<&Path>, hub: Option<&'a Hub>) -> Library<'a> {
        Library {
            homes: own.map(Path::to_owned).into_iter().chain(task_homes(dir)).collect(),
            hub,
            read: HashMap::new(),
        }
    }

    /// Returns the first candidate that exists with one of the [`EXTENSIONS`], or as it is if it has one of them.
    pub(crate) fn find(&self, candidates: &[String]) -> Option<PathBuf> {
        let paths = self.homes.iter().flat_map(|home| candidates.iter().map(move |c| home.join(c)));
        let mut files = paths.flat_map(|p| {
            let whole = EXTENSIONS.iter().any(|e| p.to_string_lossy().ends_with(&format!(".{e}")));
            let extended = EXTENSIONS.map(|e| PathBuf::from(format!("{}.{e}", p.display())));
            whole.then_some(p).into_iter().chain(extended)
        });
        files.find(|p| p.exists() && !p.is_dir())
    }

    /// Returns the rows of the first candidate that exists.
    pub(crate) fn local(&mut self, candidates: &[String]) -> Result<Option<Rows>, Error> {
        let Some(path) = self.find(candidates) else { return Ok(None) };
        let file = match self.read.get(&path) {
            Some(file) => file.clone(),
            None => Rc::new(read_rows(&path)?),
        };
        self.read.insert(path.clone(), file.clone());
        Ok(Some(Rows { path, file, fetched: None }))
    }

    /// Returns the rows of a data set, or `None` without a Hub.
    pub(crate) fn fetch(&self, dataset: &DatasetRef) -> Result<Option<Rows>, cl_data::Error> {
        let Some(hub) = self.hub else { return Ok(None) };
        let (file, paths) = dataset.rows(hub)?;
        let path = paths.first().cloned().unwrap_or_default();
        let commit = hub.commit(&path);
        let fetched = Fetched { dataset: dataset.clone(), commit, paths };
        Ok(Some(Rows { path, file: Rc::new(file), fetched: Some(fetched) }))
    }
}
