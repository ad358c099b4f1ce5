use std::path::{Path, PathBuf};

use cl_checkpoint::Interrupt;

use crate::{Download, Hub, HubError, Part, Repo};

/// Names of models and adapters, and the directories that they lead to: a local directory of that name, or else, if the
/// hub is allowed, the repository `organization/name` or `organization/name@revision`.
///
/// # Example
/// ```
/// use cl_checkpoint::Interrupt;
/// use cl_hub::{Names, Part};
///
/// let names = Names { hub: None, interrupt: Interrupt::default() };
/// assert_eq!(names.locate("./models/base", Part::Model)?.dir.to_str(), Some("./models/base"));
/// // Without the hub, a name of the hub is a path, and opening it is an error that says how to go on.
/// let located = names.locate("organization/name", Part::Model)?;
/// assert!(cl_checkpoint::Checkpoint::open(&located.dir).err().unwrap().to_string().contains("--hub"));
/// # Ok::<(), cl_hub::HubError>(())
/// ```
pub struct Names {
    /// The hub, if names may lead there.
    pub hub: Option<Hub>,
    /// Stops downloads.
    pub interrupt: Interrupt,
}

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// A local directory, or that of a snapshot in the hub's cache.
    pub dir: PathBuf,
    /// Commit of the hub's repository; `None` for local directories.
    pub commit: Option<String>,
}

impl Names {
    /// The directory of a model or adapter, downloaded if need be. Anything that is no name of the hub is taken as a
    /// path, whether it exists or not; without the hub every name is, and opening it says what is missing.
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

    /// What [`Names::locate`] would download; `None` for local directories.
    ///
    /// # Errors
    /// Returns the same errors.
    pub fn plan(&self, written: &str, part: Part) -> Result<Option<Download>, HubError> {
        self.hub.as_ref().zip(remote(written)).map(|(hub, repo)| hub.plan_model(&repo, part)).transpose()
    }

    /// The directory of a path from a command line or a configuration; see [`Names::locate`].
    ///
    /// # Errors
    /// Returns the same errors.
    pub fn directory(&self, path: &Path, part: Part) -> Result<PathBuf, HubError> {
        // A name of the hub is ASCII.
        path.to_str().map_or_else(|| Ok(path.to_owned()), |written| Ok(self.locate(written, part)?.dir))
    }
}

/// The repository that a name means, unless something of that name exists.
fn remote(written: &str) -> Option<Repo> {
    Repo::parse_model(written).filter(|_| !Path::new(written).exists())
}
