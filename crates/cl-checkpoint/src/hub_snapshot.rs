use std::fmt;
use std::path::{Component, Path};

use serde::Serializer;

/// A snapshot directory in the Hub's cache, `models--organization--name/snapshots/<commit>`. Records refer to it by
/// repository and commit, which have the same meaning everywhere, and not by its path in one machine's cache.
///
/// Layout: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>.
///
/// # Example
/// ```
/// use std::path::Path;
/// use cl_checkpoint::HubSnapshot;
///
/// let commit = "0123456789abcdef0123456789abcdef01234567";
/// let dir = format!("/cache/models--org--name/snapshots/{commit}");
/// let snapshot = HubSnapshot::of(Path::new(&dir)).unwrap();
/// assert_eq!((snapshot.repo.as_str(), snapshot.commit.as_str()), ("org/name", commit));
/// assert_eq!(HubSnapshot::source_name(Path::new(&dir)), format!("org/name@{commit}"));
/// assert_eq!(HubSnapshot::source_name(Path::new("models/base")), "models/base");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSnapshot {
    /// `organization/name`.
    pub repo: String,
    /// The commit.
    pub commit: String,
}

impl HubSnapshot {
    /// Returns the snapshot of a directory; `None` if the directory is not a snapshot.
    pub fn of(dir: &Path) -> Option<HubSnapshot> {
        let mut parts = dir.components().rev().filter_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        });
        let (commit, snapshots, folder) = (parts.next()?, parts.next()?, parts.next()?);
        let repo = folder.strip_prefix("models--").filter(|_| snapshots == "snapshots")?;
        let is_commit = commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit());
        // Names on the Hub do not contain `--`.
        is_commit.then(|| HubSnapshot { repo: repo.replacen("--", "/", 1), commit: commit.to_owned() })
    }

    /// Returns the name of a directory in records: `organization/name@commit` for a snapshot, otherwise the path.
    pub fn source_name(path: &Path) -> String {
        HubSnapshot::of(path).map_or_else(|| path.display().to_string(), |snapshot| snapshot.to_string())
    }

    /// Returns the name of a model or adapter for other tools: `organization/name` for a snapshot, otherwise the path.
    pub fn model_name(path: &Path) -> String {
        HubSnapshot::of(path).map_or_else(|| path.display().to_string(), |snapshot| snapshot.repo)
    }

    /// Whether a text is a name on the Hub, `organization/name` or `organization/name@revision`, by the Hub's rules for
    /// names.
    ///
    /// ```
    /// use cl_checkpoint::HubSnapshot;
    ///
    /// assert!(HubSnapshot::is_name("org/name") && HubSnapshot::is_name("org/name@v1"));
    /// assert!(!HubSnapshot::is_name("./name") && !HubSnapshot::is_name("models/org/name"));
    /// ```
    pub fn is_name(text: &str) -> bool {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let good = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
        name.matches('/').count() == 1 && name.split('/').all(is_valid_part) && revision.split('/').all(good)
    }

    /// Serializes a path as [`HubSnapshot::source_name`], for `#[serde(serialize_with)]`.
    ///
    /// # Errors
    /// Returns the errors of `serializer`.
    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HubSnapshot::source_name(path))
    }
}

impl fmt::Display for HubSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}@{}", self.repo, self.commit)
    }
}

/// Checks the Hub's rule for organizations and names.
fn is_valid_part(part: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| !"-.".contains(c));
    part.len() <= 96
        && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && edge(part.chars().next())
        && edge(part.chars().last())
        && !part.contains("--")
        && !part.contains("..")
}
