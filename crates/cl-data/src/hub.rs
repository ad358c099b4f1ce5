//! Data sets from the Hugging Face Hub, by name.

mod error;
mod layout;

use std::path::PathBuf;

use cl_checkpoint::Interrupt;
use cl_hub::{Hub, HubError, Repo, RepoKind, Revision, check_name};

pub use error::{DatasetError, ShardGap};
use layout::{Miss, label, pick};

use crate::Error;
use crate::rows::{RowFile, read_rows};

/// Branch of the Hub's automatic conversion to Parquet.
const CONVERTED: &str = "refs/convert/parquet";

/// One split of a data set on the Hub.
///
/// # Example
/// ```
/// use cl_data::DatasetRef;
///
/// let test = DatasetRef { config: Some("main".into()), ..DatasetRef::new("openai/gsm8k", "test") };
/// assert_eq!(test.revision, None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetRef {
    /// `organization/name`.
    pub repo: String,
    /// Configuration. If `None`: the files without a configuration, or else those of `default`, or else those of the
    /// only configuration that has the split.
    pub config: Option<String>,
    /// `train`, `validation`, `test` or any other split.
    pub split: String,
    /// Branch, tag or commit; `main` if `None`.
    pub revision: Option<String>,
}

impl DatasetRef {
    /// Refers to the current version of a split, in a data set with one configuration.
    pub fn new(repo: impl Into<String>, split: impl Into<String>) -> DatasetRef {
        DatasetRef { repo: repo.into(), config: None, split: split.into(), revision: None }
    }
}

impl DatasetRef {
    /// Returns the rows of the split, in the order of its files, and the files. The hash is that of the file or, for
    /// several files, the hash of their hashes (one per line).
    ///
    /// # Errors
    /// Returns the errors of [`DatasetRef::files`] and [`read_rows`].
    ///
    /// # Example
    /// ```no_run
    /// use cl_data::{DatasetRef, Hub};
    ///
    /// let split = DatasetRef { config: Some("main".into()), ..DatasetRef::new("openai/gsm8k", "test") };
    /// let (file, paths) = split.rows(&Hub::from_env())?;
    /// println!("{} rows in {} files", file.rows.len(), paths.len());
    /// # Ok::<(), cl_data::Error>(())
    /// ```
    pub fn rows(&self, hub: &Hub) -> Result<(RowFile, Vec<PathBuf>), Error> {
        let paths = self.files(hub)?;
        let (mut rows, mut hashes) = (Vec::new(), Vec::new());
        for path in &paths {
            let file = read_rows(path)?;
            rows.extend(file.rows);
            hashes.push(file.hash);
        }
        let hash = match hashes.as_slice() {
            [one] => one.clone(),
            several => blake3::hash(several.join("\n").as_bytes()).to_hex().to_string(),
        };
        Ok((RowFile { rows, hash }, paths))
    }

    /// Returns the files of the split in the order of its rows, downloading those that are not cached: `.parquet`, else
    /// `.jsonl`, else `.json`, in the usual layouts, or else the Hub's automatic conversion to Parquet.
    ///
    /// # Errors
    /// Returns [`Error::Hub`] if the data set or revision does not exist or may not be read, if a download fails, if a
    /// file is not cached and the Hub is set to offline, or if the cache cannot be read or written. Returns
    /// [`Error::Dataset`] if the data set has no such configuration or split.
    ///
    /// # Example
    /// ```
    /// use cl_data::{DatasetRef, Hub};
    ///
    /// // Without a network, a file that is not in the cache is an error.
    /// let cache = tempfile::tempdir()?;
    /// let hub = Hub { endpoint: "https://huggingface.co".into(), cache: cache.path().into(), token: None, offline: true };
    /// let error = DatasetRef::new("openai/gsm8k", "test").files(&hub).unwrap_err();
    /// assert!(error.to_string().contains("openai/gsm8k"));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn files(&self, hub: &Hub) -> Result<Vec<PathBuf>, Error> {
        let expected = "the name of a data set like `organization/name`";
        check_name(&self.repo, expected)?;
        if self.repo.matches('/').count() > 1 {
            return Err(HubError::Name { name: self.repo.clone(), expected }.into());
        }
        let own = self.at(self.revision.as_deref());
        let error = match self.picked(hub, &own) {
            Ok((revision, names)) => return Ok(revision.fetch(&names, &Interrupt::default())?),
            Err(error) if may_be_converted(&error) => error,
            Err(error) => return Err(error),
        };
        // If a revision is given explicitly, only its own files are used.
        if self.revision.is_some() {
            return Err(error);
        }
        let converted = self.at(Some(CONVERTED));
        match self.picked(hub, &converted) {
            Ok((revision, names)) => Ok(revision.fetch(&names, &Interrupt::default())?),
            Err(Error::Hub(HubError::NotFound { .. })) => Err(error),
            Err(other) if may_be_converted(&other) => Err(error),
            Err(other) => Err(other),
        }
    }

    fn at(&self, revision: Option<&str>) -> Repo {
        Repo { kind: RepoKind::Dataset, name: self.repo.clone(), revision: revision.map(str::to_owned) }
    }

    /// Returns a revision, and the names of its files that contain the split.
    fn picked<'a>(&self, hub: &'a Hub, repo: &'a Repo) -> Result<(Revision<'a>, Vec<String>), Error> {
        let revision = hub.revision(repo)?;
        let (repo, split) = (self.repo.clone(), self.split.clone());
        let wanted = label(self.config.as_deref(), &split);
        let names: Vec<String> = revision.files.iter().map(|file| file.name.clone()).collect();
        match pick(&names, self.config.as_deref(), &self.split) {
            Ok(names) => Ok((revision, names)),
            // Other clients may have cached only some of the files.
            Err(Miss::Nothing(found)) if !revision.complete => {
                Err(revision.offline(&format!("{wanted} (there is {})", error::list(&found))).into())
            }
            Err(Miss::Nothing(found)) => Err(DatasetError::NoSplit { repo, wanted, found }.into()),
            Err(Miss::Ambiguous(configs)) => Err(DatasetError::Config { repo, split, configs }.into()),
            Err(Miss::Shards(gap)) => {
                Err(DatasetError::Shards { repo, split, gap: Box::new(gap), offline: !revision.complete }.into())
            }
        }
    }
}

/// Whether the automatic conversion may contain what a revision lacks.
fn may_be_converted(error: &Error) -> bool {
    matches!(error, Error::Dataset(DatasetError::NoSplit { .. }) | Error::Hub(HubError::Offline { .. }))
}
