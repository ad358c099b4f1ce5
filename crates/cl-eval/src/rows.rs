//! Where the rows of a task are found.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cl_data::{RowFile, read_rows};
use serde_json::{Value, json};

use crate::Error;

/// Extensions that are looked for behind a candidate.
const EXTENSIONS: [&str; 6] = ["jsonl", "json", "jsonl.gz", "json.gz", "parquet", "parquet.gz"];

/// Rows and where they were.
#[derive(Clone)]
pub(crate) struct Rows {
    pub(crate) path: PathBuf,
    pub(crate) file: Rc<RowFile>,
}

impl Rows {
    pub(crate) fn settings(&self) -> Value {
        json!({ "path": self.path, "blake3": self.file.hash })
    }
}

/// Folders that files are looked for in, and what was read from them already.
pub(crate) struct Library {
    homes: Vec<PathBuf>,
    read: HashMap<PathBuf, Rc<RowFile>>,
}

impl Library {
    /// `own`: the folder of the task's description, which comes first.
    pub(crate) fn new(dir: &Path, own: Option<&Path>) -> Library {
        let around = ["", "..", "lm-eval", "../lm-eval"]
            .map(|home| if home.is_empty() { dir.to_owned() } else { dir.join(home) });
        Library { homes: own.map(Path::to_owned).into_iter().chain(around).collect(), read: HashMap::new() }
    }

    /// The first of some candidates without extension that exists.
    pub(crate) fn find(&self, candidates: &[String]) -> Option<PathBuf> {
        let paths = self.homes.iter().flat_map(|home| candidates.iter().map(move |c| home.join(c)));
        let mut files = paths.flat_map(|p| EXTENSIONS.map(|e| PathBuf::from(format!("{}.{e}", p.display()))));
        files.find(|p| p.is_file())
    }

    /// The rows of the first candidate that exists, if there is one. Data sets of the hub are to be looked up here.
    pub(crate) fn find_rows(&mut self, candidates: &[String]) -> Result<Option<Rows>, Error> {
        let Some(path) = self.find(candidates) else { return Ok(None) };
        if let Some(file) = self.read.get(&path) {
            return Ok(Some(Rows { path, file: file.clone() }));
        }
        let file = Rc::new(read_rows(&path)?);
        self.read.insert(path.clone(), file.clone());
        Ok(Some(Rows { path, file }))
    }
}
