use std::path::{Path, PathBuf};

use cl_checkpoint::Interrupt;

use crate::{Download, Hub, HubError, Part, Repo};

/// Resolves names of models and adapters to directories: a local directory with that name, or else, if downloads are
/// allowed, the repository `organization/name` or `organization/name@revision`.
///
/// # Example
/// ```
/// use cl_checkpoint::Interrupt;
/// use cl_hub::{Names, Part};
///
/// let names = Names { hub: None, interrupt: Interrupt::default() };
/// assert_eq!(names.locate("./models/base", Part::Model)?.dir.to_str(), Some("./models/base"));
/// // Without the Hub, a Hub name is treated as a path, and opening it is an error that suggests --hub.
/// let located = names.locate("organization/name", Part::Model)?;
/// assert!(cl_checkpoint::Checkpoint::open(&located.dir).err().unwrap().to_string().contains("--hub"));
/// # Ok::<(), cl_hub::HubError>(())
/// ```
pub struct Names {
    /// The Hub, if downloads are allowed.
    pub hub: Option<Hub>,
    /// Stop request for downloads.
    pub interrupt: Interrupt,
}

/// A resolved name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// A local directory, or that of a snapshot in the Hub cache.
    pub dir: PathBuf,
    /// Commit of the Hub repository; `None` for local directories.
    pub commit: Option<String>,
}

impl Names {
    /// Returns the directory of a model or adapter, after downloading it if necessary. Anything that is not a Hub name
    /// is treated as a path, whether it exists or not. Without the Hub, every name is treated as a path, and opening it
    /// reports what is missing.
    ///
    /// # Errors
    /// Returns the errors of [`Hub::model`].
    pub fn locate(&self, written: &str, part: Part) -> Result<Located, HubError> {
        let Some((hub, repo)) = self.hub.as_ref().zip(remote(written)) else {
            return Ok(Located { dir: PathBuf::from(written), commit: None });
        };
        let snapshot = hub.model(&repo, part, &self.interrupt)?;
        Ok(Located { dir: snapshot.dir, commit: Some(snapshot.commit) })
    }

    /// Plans the download of [`Names::locate`]; returns `None` for local directories.
    ///
    /// # Errors
    /// Returns the same errors.
    pub fn plan(&self, written: &str, part: Part) -> Result<Option<Download>, HubError> {
        self.hub.as_ref().zip(remote(written)).map(|(hub, repo)| hub.plan_model(&repo, part)).transpose()
    }

    /// Returns the directory for a path from a command line or a configuration; see [`Names::locate`].
    ///
    /// # Errors
    /// Returns the same errors.
    pub fn directory(&self, path: &Path, part: Part) -> Result<PathBuf, HubError> {
        // Names on the Hub are ASCII.
        path.to_str().map_or_else(|| Ok(path.to_owned()), |written| Ok(self.locate(written, part)?.dir))
    }
}

/// Returns the repository with this name, unless there is a local path with the same name.
fn remote(written: &str) -> Option<Repo> {
    Repo::parse_model(written).filter(|_| !Path::new(written).exists())
}
