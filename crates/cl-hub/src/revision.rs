use std::path::PathBuf;

use cl_checkpoint::Interrupt;

use crate::cache::RepoCache;
use crate::http::{Client, Subject, encoded};
use crate::problem::RepoProblem;
use crate::{Hub, HubError, Repo, check_name};

/// A repository at the commit of a revision.
pub struct Revision<'a> {
    hub: &'a Hub,
    repo: &'a Repo,
    cache: RepoCache,
    /// The commit.
    pub commit: String,
    /// Its files.
    pub files: Vec<RepoFile>,
    /// Whether `files` contains all files of the commit; otherwise, it contains those that other clients have cached.
    pub complete: bool,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoFile {
    /// Path in the repository.
    pub name: String,
    /// Size in bytes, if the Hub was queried.
    pub size: Option<u64>,
}

impl Hub {
    /// Returns the commit of a repository's revision and its files, from the Hub (storing them for offline use), or
    /// from the cache if the Hub is set to offline.
    ///
    /// # Errors
    /// Returns an error if a name is invalid, if the repository or revision does not exist or is not accessible, if the
    /// Hub does not respond, or if the Hub is set to offline and the revision is not cached.
    pub fn revision<'a>(&'a self, repo: &'a Repo) -> Result<Revision<'a>, HubError> {
        self.revision_interruptible(repo, &Interrupt::default())
    }

    /// Like [`Hub::revision`]; a stop request ends the pauses between requests to a busy server.
    ///
    /// # Errors
    /// Returns the errors of [`Hub::revision`], and [`HubError::Interrupted`].
    pub fn revision_interruptible<'a>(
        &'a self,
        repo: &'a Repo,
        interrupt: &Interrupt,
    ) -> Result<Revision<'a>, HubError> {
        check_name(repo.revision(), "a revision")?;
        let cache = RepoCache::new(&self.cache, repo);
        let mut revision =
            Revision { hub: self, repo, cache, commit: String::new(), files: Vec::new(), complete: true };
        if self.offline {
            revision.commit = revision
                .cache
                .commit(repo.revision())
                .ok_or_else(|| revision.offline(&format!("the {}", repo.kind)))?;
            let (names, complete) = revision.cache.listing(&revision.commit);
            revision.files = names.into_iter().map(|name| RepoFile { name, size: None }).collect();
            revision.complete = complete;
            return Ok(revision);
        }
        let info = Client::new(self.token.as_deref(), interrupt).info(&revision.subject())?;
        check_name(&info.sha, "a commit")?;
        revision.commit = info.sha;
        revision.files = info.siblings.into_iter().map(|s| RepoFile { name: s.rfilename, size: s.size }).collect();
        let names: Vec<String> = revision.files.iter().map(|file| file.name.clone()).collect();
        names.iter().try_for_each(|name| check_name(name, "the name of a file"))?;
        // A read-only cache can still be used for reading.
        let _ = revision.cache.set_commit(repo.revision(), &revision.commit);
        let _ = revision.cache.set_listing(&revision.commit, &names);
        Ok(revision)
    }
}

impl Revision<'_> {
    /// Returns the directory of its files in the cache.
    pub fn dir(&self) -> PathBuf {
        self.cache.snapshot(&self.commit)
    }

    /// Whether a file is in the cache.
    pub fn is_cached(&self, name: &str) -> bool {
        self.dir().join(name).is_file()
    }

    /// Returns the paths of files in the cache, after downloading missing ones. Each file is complete and verified.
    ///
    /// # Errors
    /// Returns an error if a download fails or is interrupted, if a file is not cached and the Hub is set to offline,
    /// or if the cache cannot be written.
    pub fn fetch(&self, names: &[String], interrupt: &Interrupt) -> Result<Vec<PathBuf>, HubError> {
        let fetch = |name: &String| {
            let path = self.dir().join(name);
            match path.is_file() {
                true => Ok(path),
                false if self.hub.offline => Err(self.offline(name)),
                false => self.download(name, interrupt),
            }
        };
        names.iter().map(fetch).collect()
    }

    /// Downloads a file atomically.
    fn download(&self, name: &str, interrupt: &Interrupt) -> Result<PathBuf, HubError> {
        let Subject { endpoint, repo, .. } = self.subject();
        let (prefix, commit) = (self.repo.kind.prefix(), &self.commit);
        let url = format!("{endpoint}/{prefix}{repo}/resolve/{commit}/{}", encoded(name, true));
        let client = Client::new(self.hub.token.as_deref(), interrupt);
        self.cache.prepare()?;
        let meta = client.head(&self.subject(), &url)?;
        let _lock = self.cache.lock(&meta.etag)?;
        // Another process may have downloaded the file in the meantime, and may already be using it.
        let path = self.dir().join(name);
        if path.is_file() {
            return Ok(path);
        }
        let blob = self.cache.blob(&meta.etag);
        if !blob.is_file() {
            // Written under the lock, resumed after a kill, and renamed once it is complete and verified. The name
            // differs from that of Python's client, whose partial downloads are not resumed.
            let part = self.cache.blob(&format!("{}.cl.incomplete", meta.etag));
            client.download(&self.subject(), &url, &meta, &part, interrupt)?;
            std::fs::rename(&part, &blob).map_err(HubError::io(&blob))?;
        }
        self.cache.link(&meta.etag, commit, name)
    }

    fn subject(&self) -> Subject<'_> {
        Subject {
            endpoint: self.hub.endpoint.trim_end_matches('/'),
            kind: self.repo.kind,
            repo: &self.repo.name,
            revision: self.repo.revision(),
        }
    }

    /// Returns an error that states what is not cached.
    pub fn offline(&self, missing: &str) -> HubError {
        HubError::Offline {
            kind: self.repo.kind,
            repo: self.repo.name.clone(),
            revision: self.repo.revision().to_owned(),
            missing: missing.to_owned(),
            cache: self.hub.cache.clone(),
        }
    }

    /// Returns an error that states why the repository is not what is needed.
    pub(crate) fn unusable(&self, problem: RepoProblem) -> HubError {
        let (repo, revision) = (self.repo.name.clone(), self.repo.revision().to_owned());
        HubError::Unusable { repo, revision, problem }
    }
}
