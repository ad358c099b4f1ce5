//! Data sets by name from the Hugging Face hub.

mod cache;
mod error;
mod http;
mod layout;

use std::fmt;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_text};

use cache::{RepoCache, check_name};
pub use error::HubError;
use http::{Client, Subject, encoded};
use layout::{Miss, label, pick};

use crate::Error;
use crate::rows::{RowFile, read_rows};

/// Branch of the hub's automatic conversion to Parquet.
const CONVERTED: &str = "refs/convert/parquet";

/// One split of a data set on the hub.
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
    /// Configuration. If `None`, the files without a configuration, or else of `default`, or else of the only
    /// configuration with the split.
    pub config: Option<String>,
    /// `train`, `validation`, `test` or any other split.
    pub split: String,
    /// Branch, tag or commit; `main` if `None`.
    pub revision: Option<String>,
}

impl DatasetRef {
    /// The current split of a data set with one configuration.
    pub fn new(repo: impl Into<String>, split: impl Into<String>) -> DatasetRef {
        DatasetRef { repo: repo.into(), config: None, split: split.into(), revision: None }
    }
}

/// The Hugging Face hub, with the disk cache that its Python clients use as well.
///
/// # Example
/// ```
/// use cl_data::{DatasetRef, Hub};
///
/// // Without a network, what is not in the cache is an error that says so.
/// let cache = tempfile::tempdir()?;
/// let hub = Hub { endpoint: "https://huggingface.co".into(), cache: cache.path().into(), token: None, offline: true };
/// let error = hub.dataset_files(&DatasetRef::new("openai/gsm8k", "test")).unwrap_err();
/// assert!(error.to_string().contains("openai/gsm8k"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Hub {
    /// Address of the hub, with or without a slash at its end.
    pub endpoint: String,
    /// The folder that holds `datasets--organization--name`.
    pub cache: PathBuf,
    /// Access token for private and gated data sets.
    pub token: Option<String>,
    /// Whether to send no requests.
    pub offline: bool,
}

impl fmt::Debug for Hub {
    /// Omits the token, which must not be logged.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &token)
            .field("offline", &self.offline)
            .finish()
    }
}

impl Hub {
    /// Settings from the environment variables of `huggingface_hub`: `HF_ENDPOINT`; `HF_HUB_CACHE`, else `HF_HOME`,
    /// else `XDG_CACHE_HOME`, else the user's `.cache`; `HF_TOKEN`, else the file that `HF_TOKEN_PATH` names, else
    /// `token` in `HF_HOME`; `HF_HUB_OFFLINE` (also `HF_DATASETS_OFFLINE` and `TRANSFORMERS_OFFLINE`).
    ///
    /// Source: <https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>.
    pub fn from_env() -> Hub {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Hub {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let user = set("HOME").or_else(|| set("USERPROFILE")).unwrap_or_else(|| ".".to_owned());
        let folder = |name: &str| set(name).map(|path| expanded(&path, &user));
        let home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .unwrap_or_else(|| Path::new(&user).join(".cache/huggingface"));
        let cache =
            folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub"));
        let kept = || read_text(&folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")), MAX_CONFIG).ok();
        let yes = |name: &str| {
            set(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| if yes("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { kept() });
        Hub {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            cache,
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().any(yes),
        }
    }

    /// Rows of a split, in the order of its files, and the files. The hash is the file's, or, for several files, the
    /// hash of their hashes (one per line).
    ///
    /// # Errors
    /// Returns the errors of [`Hub::dataset_files`] and [`read_rows`].
    ///
    /// # Example
    /// ```no_run
    /// use cl_data::{DatasetRef, Hub};
    ///
    /// let split = DatasetRef { config: Some("main".into()), ..DatasetRef::new("openai/gsm8k", "test") };
    /// let (file, paths) = Hub::from_env().dataset_rows(&split)?;
    /// println!("{} rows in {} files", file.rows.len(), paths.len());
    /// # Ok::<(), cl_data::Error>(())
    /// ```
    pub fn dataset_rows(&self, dataset: &DatasetRef) -> Result<(RowFile, Vec<PathBuf>), Error> {
        let paths = self.dataset_files(dataset)?;
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

    /// Files of a split in the order of its rows, downloaded if they are not cached: `.parquet`, else `.jsonl`, else
    /// `.json`, in the usual layouts, or else the hub's automatic conversion to Parquet.
    ///
    /// # Errors
    /// Returns [`Error::Hub`] if the data set, revision, configuration or split does not exist or may not be read, if a
    /// download fails, if a file is not cached and the hub is offline, or if the cache cannot be written. Returns
    /// [`Error::Io`] if the cache cannot be read.
    pub fn dataset_files(&self, dataset: &DatasetRef) -> Result<Vec<PathBuf>, Error> {
        check_name(&dataset.repo, "the name of a data set like `organization/name`")?;
        if dataset.repo.matches('/').count() > 1 {
            let expected = "the name of a data set like `organization/name`";
            return Err(HubError::Name { name: dataset.repo.clone(), expected }.into());
        }
        let revision = dataset.revision.as_deref().unwrap_or("main");
        check_name(revision, "a revision")?;
        let own = self.source(dataset, revision);
        let error = match own.picked(dataset) {
            Ok((commit, names)) => return own.files(&commit, &names),
            Err(Error::Hub(error @ (HubError::NoSplit { .. } | HubError::Offline { .. }))) => error,
            Err(error) => return Err(error),
        };
        // For an explicit revision, only its own files are used.
        if dataset.revision.is_some() {
            return Err(error.into());
        }
        let converted = self.source(dataset, CONVERTED);
        match converted.picked(dataset) {
            Ok((commit, names)) => converted.files(&commit, &names),
            Err(Error::Hub(HubError::NotFound { .. } | HubError::NoSplit { .. } | HubError::Offline { .. })) => {
                Err(error.into())
            }
            Err(error) => Err(error),
        }
    }

    /// The commit that a file of the cache belongs to; `None` for any other file.
    ///
    /// # Example
    /// ```
    /// use cl_data::Hub;
    ///
    /// let hub = Hub { endpoint: String::new(), cache: "/c".into(), token: None, offline: true };
    /// let path = hub.cache.join("datasets--openai--gsm8k/snapshots/0123abcd/main/test.jsonl");
    /// assert_eq!(hub.commit(&path).as_deref(), Some("0123abcd"));
    /// assert_eq!(hub.commit("test.jsonl".as_ref()), None);
    /// ```
    pub fn commit(&self, path: &Path) -> Option<String> {
        let mut parts = path.strip_prefix(&self.cache).ok()?.iter();
        parts.nth(1).filter(|folder| *folder == "snapshots")?;
        Some(parts.next()?.to_str()?.to_owned())
    }

    fn source<'a>(&'a self, dataset: &'a DatasetRef, revision: &'a str) -> Source<'a> {
        let endpoint = self.endpoint.trim_end_matches('/');
        let cache = RepoCache::new(&self.cache, &dataset.repo);
        Source { hub: self, subject: Subject { endpoint, repo: &dataset.repo, revision }, cache }
    }
}

/// One revision of one data set.
struct Source<'a> {
    hub: &'a Hub,
    subject: Subject<'a>,
    cache: RepoCache,
}

/// A revision's commit and its files.
struct Known {
    commit: String,
    names: Vec<String>,
    /// Whether the list is complete.
    all: bool,
}

impl Source<'_> {
    /// The commit, and which of its files hold the split.
    fn picked(&self, dataset: &DatasetRef) -> Result<(String, Vec<String>), Error> {
        let known = if self.hub.offline { self.known()? } else { self.asked()? };
        let (repo, split) = (dataset.repo.clone(), dataset.split.clone());
        let wanted = label(dataset.config.as_deref(), &split);
        match pick(&known.names, dataset.config.as_deref(), &dataset.split) {
            Ok(names) => Ok((known.commit, names)),
            // Other clients may have cached only some of the files.
            Err(Miss::Nothing(found)) if !known.all => Err(self.offline(&format!("{wanted} (there is {found})"))),
            Err(Miss::Shards(message)) if !known.all => {
                let message = format!("{message} in the cache, and HF_HUB_OFFLINE is set");
                Err(HubError::Shards { repo, split, message }.into())
            }
            Err(Miss::Nothing(found)) => Err(HubError::NoSplit { repo, wanted, found }.into()),
            Err(Miss::Ambiguous(configs)) => Err(HubError::Config { repo, split, configs }.into()),
            Err(Miss::Shards(message)) => Err(HubError::Shards { repo, split, message }.into()),
        }
    }

    /// From the cache alone.
    fn known(&self) -> Result<Known, Error> {
        let commit = self.cache.commit(self.subject.revision).ok_or_else(|| self.offline("the data set"))?;
        let (names, all) = self.cache.listing(&commit);
        Ok(Known { commit, names, all })
    }

    /// From the hub; the answer is cached for offline use.
    fn asked(&self) -> Result<Known, Error> {
        let info = self.client().info(&self.subject)?;
        let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        check_name(&info.sha, "a commit")?;
        names.iter().try_for_each(|name| check_name(name, "the name of a file"))?;
        // A read-only cache can still be read.
        let _ = self.cache.set_commit(self.subject.revision, &info.sha);
        let _ = self.cache.set_listing(&info.sha, &names);
        Ok(Known { commit: info.sha, names, all: true })
    }

    fn files(&self, commit: &str, names: &[String]) -> Result<Vec<PathBuf>, Error> {
        names
            .iter()
            .map(|name| {
                let path = self.cache.snapshot(commit).join(name);
                match path.is_file() {
                    true => Ok(path),
                    false if self.hub.offline => Err(self.offline(name)),
                    false => self.fetch(commit, name),
                }
            })
            .collect()
    }

    /// Downloads a file atomically.
    fn fetch(&self, commit: &str, name: &str) -> Result<PathBuf, Error> {
        let Subject { endpoint, repo, .. } = self.subject;
        let url = format!("{endpoint}/datasets/{repo}/resolve/{commit}/{}", encoded(name, true));
        let client = self.client();
        self.cache.prepare()?;
        let meta = client.head(&self.subject, &url)?;
        let _lock = self.cache.lock(&meta.etag)?;
        let blob = self.cache.blob(&meta.etag);
        if !blob.is_file() {
            let io = |source| Error::Io { path: blob.clone(), source };
            // Written under the lock, and resumed after a kill; renamed once complete and verified.
            // Differs from the name that Python's client uses, whose partial downloads are not resumed.
            let part = self.cache.blob(&format!("{}.cl.incomplete", meta.etag));
            client.download(&self.subject, &url, &meta, &part)?;
            std::fs::rename(&part, &blob).map_err(io)?;
        }
        self.cache.link(&meta.etag, commit, name)
    }

    fn client(&self) -> Client {
        Client::new(self.hub.token.as_deref())
    }

    fn offline(&self, missing: &str) -> Error {
        let Subject { repo, revision, .. } = self.subject;
        let (repo, revision, missing) = (repo.to_owned(), revision.to_owned(), missing.to_owned());
        HubError::Offline { repo, revision, missing, cache: self.hub.cache.clone() }.into()
    }
}

/// Expands `~` to the home directory.
fn expanded(path: &str, user: &str) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => Path::new(user).join(rest),
        None => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        Hub::from_variables(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn variables_of_the_environment() {
        let plain = hub(&[("HOME", "/u")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/u/.cache/huggingface/hub"));
        assert_eq!((plain.token, plain.offline), (None, false));
        assert_eq!(hub(&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")]).cache, Path::new("/x/huggingface/hub"));
        assert_eq!(hub(&[("HOME", "/u"), ("HF_HOME", "~/h")]).cache, Path::new("/u/h/hub"));
        assert_eq!(hub(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
        assert_eq!(hub(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror/");
        for value in ["1", "true", "YES"] {
            assert!(hub(&[("HF_HUB_OFFLINE", value)]).offline);
        }
        assert!(!hub(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn tokens() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "kept\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(hub(&[("HF_HOME", home)]).token.as_deref(), Some("kept"));
        let given = hub(&[("HF_HOME", home), ("HF_TOKEN", "given")]);
        assert_eq!(given.token.as_deref(), Some("given"));
        assert!(!format!("{given:?}").contains("given"));
    }
}
