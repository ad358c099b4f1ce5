use std::fmt;

use cl_checkpoint::HubSnapshot;

use crate::HubError;

/// Kind of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// Models and adapters.
    Model,
    /// Data sets.
    Dataset,
}

impl RepoKind {
    /// Returns the plural used in the Hub's API: `models`, `datasets`.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        }
    }

    /// Returns the prefix of a repository's name in the address of a file.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            RepoKind::Model => "",
            RepoKind::Dataset => "datasets/",
        }
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "data set",
        })
    }
}

/// A repository of the Hub at a revision.
///
/// # Example
/// ```
/// use cl_hub::Repo;
///
/// let repo = Repo::parse_model("openai/gsm8k-tuned@v1").unwrap();
/// assert_eq!((repo.name.as_str(), repo.revision()), ("openai/gsm8k-tuned", "v1"));
/// assert_eq!(Repo::parse_model("o/m").unwrap().revision(), "main");
/// assert!(Repo::parse_model("models/o/m").is_none() && Repo::parse_model("./m").is_none());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// Models or data sets.
    pub kind: RepoKind,
    /// `organization/name`.
    pub name: String,
    /// Branch, tag or commit; `main` if `None`.
    pub revision: Option<String>,
}

impl Repo {
    /// Parses a model name in the form used by mergekit and the commands: `organization/name`, or
    /// `organization/name@revision`. Returns `None` if it is not a valid Hub name.
    pub fn parse_model(written: &str) -> Option<Repo> {
        let (name, revision) = match written.split_once('@') {
            Some((name, revision)) => (name, Some(revision.to_owned())),
            None => (written, None),
        };
        HubSnapshot::is_name(written).then(|| Repo { kind: RepoKind::Model, name: name.to_owned(), revision })
    }

    /// Returns the branch, tag or commit.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.name)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// Checks that a name from a configuration or a server does not refer to a path outside the cache.
///
/// # Errors
/// Returns [`HubError::Name`], with a description of what is `expected`, if it does.
pub fn check_name(name: &str, expected: &'static str) -> Result<(), HubError> {
    let good = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
    if name.split('/').all(good) { Ok(()) } else { Err(HubError::Name { name: name.to_owned(), expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_and_paths() {
        for good in ["o/m", "Qwen/Qwen2.5-0.5B", "o/m@refs/pr/1", "a_b/c.d@0123abcd"] {
            assert_eq!(Repo::parse_model(good).unwrap().to_string(), good);
        }
        let bad =
            ["", "m", "/o/m", "o/m/", "../m", "./m", "o//m", "o/-m", "o/m--n", "o/m n", "~/m", "o/m@", "o/m@a/../b"];
        for bad in bad {
            assert_eq!(Repo::parse_model(bad), None, "{bad}");
        }
    }
}
