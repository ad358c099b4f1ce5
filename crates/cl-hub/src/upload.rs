//! Uploads of files to a Hub repository in one commit.
//!
//! API: <https://huggingface.co/docs/hub/api>. Large files are uploaded with the batch API of Git LFS
//! (<https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>), in one piece or in the parts that the Hub
//! requests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cl_checkpoint::Interrupt;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::SendBody;
use ureq::http::{Response, header};

use crate::http::{Client, Pauses, Subject, git_sha1, network, origin, retry_after, sha256, text};
use crate::problem::{AnswerProblem, Cut, UploadProblem};
use crate::{Hub, HubError, RepoKind};

/// Maximum number of files in a request that asks how files are stored, or where to send them.
const BATCH: usize = 100;
/// Number of bytes at the start of a file from which the Hub decides how it is stored.
const SAMPLE: u64 = 512;
/// Size limit for files that are not stored by LFS; the Hub does not accept larger ones either.
const LARGEST_REGULAR: u64 = 16 << 20;
/// Size limit for responses.
const LARGEST_ANSWER: u64 = 64 << 20;

/// A file to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload {
    /// Path in the repository.
    pub name: String,
    /// Its content.
    pub content: Content,
}

/// Content of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The content of a local file.
    File(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// Summary of an upload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uploaded {
    /// Number of files that the repository already had with the same content.
    pub unchanged: usize,
    /// Number of files in the commit.
    pub sent: usize,
    /// Number of bytes of large files that were uploaded to the storage.
    pub bytes: u64,
    /// The commit; `None` if nothing has changed.
    pub commit: Option<String>,
}

/// A file, and what identifies its content.
struct Prepared<'a> {
    upload: &'a Upload,
    size: u64,
    sha256: String,
    git_sha1: String,
    large: bool,
}

impl Content {
    fn open(&self) -> Result<Box<dyn ReadSeek + '_>, HubError> {
        Ok(match self {
            Content::File(path) => Box::new(File::open(path).map_err(HubError::io(path))?),
            Content::Bytes(bytes) => Box::new(std::io::Cursor::new(bytes)),
        })
    }

    /// Returns the size in bytes.
    ///
    /// # Errors
    /// Returns [`HubError::Io`] if the file cannot be read.
    pub fn size(&self) -> Result<u64, HubError> {
        match self {
            Content::File(path) => Ok(std::fs::metadata(path).map_err(HubError::io(path))?.len()),
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }
}

trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

impl Hub {
    /// Uploads files to the branch `main` of a model repository in one commit; creates the repository if it does not
    /// exist. Files that it already contains with the same content are not sent, nor large files that were already
    /// stored by an interrupted upload. Requires a token with write access.
    ///
    /// # Errors
    /// Returns an error if there is no token or it has no write access, if the Hub is set to offline or does not
    /// respond as expected, if a file cannot be read, or if the upload is interrupted.
    pub fn upload(
        &self,
        repo: &str,
        private: bool,
        files: &[Upload],
        message: &str,
        interrupt: &Interrupt,
    ) -> Result<Uploaded, HubError> {
        let needs = |problem| HubError::Upload { repo: repo.to_owned(), problem };
        if self.offline {
            return Err(needs(UploadProblem::Offline));
        }
        if self.token.is_none() {
            return Err(needs(UploadProblem::NoToken));
        }
        let subject =
            Subject { endpoint: self.endpoint.trim_end_matches('/'), kind: RepoKind::Model, repo, revision: "main" };
        let sender = Sender { client: Client::new(self.token.as_deref(), interrupt), subject, interrupt };
        sender.create(private)?;
        let mut prepared = files.iter().map(prepare).collect::<Result<Vec<_>, _>>()?;
        let mut done = Uploaded::default();
        let existing = sender.preupload(&mut prepared)?;
        let same = |file: &Prepared<'_>| {
            let own = if file.large { &file.sha256 } else { &file.git_sha1 };
            existing.get(&file.upload.name) == Some(own)
        };
        let (unchanged, changed): (Vec<_>, Vec<_>) = prepared.iter().partition(|file| same(file));
        (done.unchanged, done.sent) = (unchanged.len(), changed.len());
        let large: Vec<&Prepared<'_>> = changed.iter().copied().filter(|file| file.large).collect();
        for files in large.chunks(BATCH) {
            done.bytes += sender.store(files)?;
        }
        if !changed.is_empty() {
            done.commit = Some(sender.commit(&changed, message)?);
        }
        Ok(done)
    }
}

fn prepare(upload: &Upload) -> Result<Prepared<'_>, HubError> {
    let size = upload.content.size()?;
    let io = |source| HubError::Io { path: PathBuf::from(&upload.name), source };
    let sha256 = sha256(&mut upload.content.open()?).map_err(io)?;
    let git_sha1 = git_sha1(&mut upload.content.open()?, size).map_err(io)?;
    Ok(Prepared { upload, size, sha256, git_sha1, large: false })
}

/// Sends requests about one repository.
struct Sender<'a> {
    client: Client,
    subject: Subject<'a>,
    interrupt: &'a Interrupt,
}

/// The batch API's response for an object.
#[derive(Deserialize)]
struct Stored {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: BTreeMap<String, Value>,
}

impl Sender<'_> {
    fn create(&self, private: bool) -> Result<(), HubError> {
        let url = format!("{}/api/repos/create", self.subject.endpoint);
        let (organization, name) = self.subject.repo.split_once('/').unwrap_or(("", self.subject.repo));
        let body = json!({ "type": "model", "organization": organization, "name": name, "private": private });
        let response = self.post(&url, "application/json", &body.to_string().into_bytes(), true)?;
        // The repository already exists.
        match response.status().as_u16() {
            409 => Ok(()),
            _ => self.client.checked(&self.subject, &url, response).map(|_| ()),
        }
    }

    /// Requests how each file is stored, and returns the hashes of files that the repository already has.
    fn preupload(&self, files: &mut [Prepared<'_>]) -> Result<BTreeMap<String, String>, HubError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Mode {
            path: String,
            upload_mode: String,
            #[serde(default)]
            oid: Option<String>,
        }
        #[derive(Deserialize)]
        struct Modes {
            files: Vec<Mode>,
        }
        let mut existing = BTreeMap::new();
        for chunk in files.chunks_mut(BATCH) {
            let url = format!("{}/api/models/{}/preupload/main", self.subject.endpoint, self.subject.repo);
            let mut asked = Vec::new();
            for file in chunk.iter() {
                let mut sample = Vec::new();
                let io = |source| HubError::Io { path: PathBuf::from(&file.upload.name), source };
                file.upload.content.open()?.take(SAMPLE).read_to_end(&mut sample).map_err(io)?;
                asked.push(json!({ "path": file.upload.name, "size": file.size, "sample": STANDARD.encode(sample) }));
            }
            let body = json!({ "files": asked }).to_string().into_bytes();
            let modes: Modes = self.answer(&url, "application/json", &body, true)?;
            for mode in modes.files {
                if let Some(file) = chunk.iter_mut().find(|file| file.upload.name == mode.path) {
                    file.large = mode.upload_mode == "lfs";
                }
                existing.extend(mode.oid.map(|oid| (mode.path, oid)));
            }
        }
        Ok(existing)
    }

    /// Sends large files to the storage unless it already has them. Returns the number of bytes sent.
    fn store(&self, files: &[&Prepared<'_>]) -> Result<u64, HubError> {
        #[derive(Deserialize)]
        struct Batch {
            objects: Vec<Stored>,
        }
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.subject.endpoint, self.subject.repo);
        let objects: Vec<Value> = files.iter().map(|f| json!({ "oid": f.sha256, "size": f.size })).collect();
        let body = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "objects": objects, "hash_algo": "sha256",
            "ref": { "name": "main" },
        });
        let batch: Batch = self.answer(&url, "application/vnd.git-lfs+json", &body.to_string().into_bytes(), true)?;
        let mut sent = 0;
        for object in batch.objects {
            let Some(file) = files.iter().find(|file| file.sha256 == object.oid) else { continue };
            if let Some(error) = object.error {
                return Err(self.failed(UploadProblem::Refused { file: file.upload.name.clone(), error }));
            }
            // The storage already has the file.
            let Some(actions) = object.actions else { continue };
            if let Some(upload) = &actions.upload {
                tracing::info!("uploading {}, {:.1} MB", file.upload.name, file.size as f64 / 1e6);
                self.send_object(file, upload)?;
                sent += file.size;
            }
            if let Some(verify) = &actions.verify {
                let body = json!({ "oid": file.sha256, "size": file.size }).to_string().into_bytes();
                let response = self.post(&verify.href, "application/vnd.git-lfs+json", &body, true)?;
                self.answer_of(&verify.href, response)?;
            }
        }
        Ok(sent)
    }

    fn send_object(&self, file: &Prepared<'_>, action: &Action) -> Result<(), HubError> {
        let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
        let Some(part_size) = action.header.get("chunk_size").and_then(number).filter(|size| *size > 0) else {
            return self.put(file, &action.href, &action.header, 0..file.size).map(|_| ());
        };
        // The other headers are the addresses of the parts, by part number.
        let parts = action.header.iter().filter_map(|(key, url)| Some((key.parse::<u64>().ok()?, url.as_str()?)));
        let parts: BTreeMap<u64, &str> = parts.collect();
        let count = file.size.div_ceil(part_size);
        let mut etags = Vec::new();
        for number in 1..=count {
            let url = parts.get(&number);
            let url = url.ok_or_else(|| self.failed(UploadProblem::NoAddress { part: number, count }))?;
            let start = (number - 1) * part_size;
            let range = start..(start + part_size).min(file.size);
            let response = self.put(file, url, &BTreeMap::new(), range)?;
            let etag = text(response.headers(), "etag");
            let etag = etag.ok_or_else(|| self.failed(UploadProblem::NoEtag { part: number }))?;
            etags.push(json!({ "partNumber": number, "etag": etag }));
        }
        let body = json!({ "oid": file.sha256, "parts": etags }).to_string().into_bytes();
        let response = self.post(&action.href, "application/vnd.git-lfs+json", &body, false)?;
        self.answer_of(&action.href, response).map(|_| ())
    }

    /// Sends a range of a file to the storage. The address is signed, and the token is not sent.
    fn put(
        &self,
        file: &Prepared<'_>,
        url: &str,
        headers: &BTreeMap<String, Value>,
        range: std::ops::Range<u64>,
    ) -> Result<Response<ureq::Body>, HubError> {
        let io = |source| HubError::Io { path: PathBuf::from(&file.upload.name), source };
        let mut pauses = Pauses::new(self.interrupt);
        loop {
            if self.interrupt.requested() {
                return Err(self.failed(UploadProblem::Stopped));
            }
            let mut content = file.upload.content.open()?;
            content.seek(SeekFrom::Start(range.start)).map_err(io)?;
            let mut part = content.take(range.end - range.start);
            let mut request = self.client.agent.put(url).header(header::CONTENT_LENGTH, range.end - range.start);
            for (name, value) in headers.iter().filter_map(|(name, value)| Some((name, value.as_str()?))) {
                request = request.header(name, value);
            }
            let (cut, pause) = match request.send(SendBody::from_reader(&mut part)) {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let (status, pause) = (response.status(), retry_after(response.headers()));
                    if status != 429 && !status.is_server_error() {
                        let (file, status) = (file.upload.name.clone(), status.as_u16());
                        return Err(self.failed(UploadProblem::Storage { file, status }));
                    }
                    (Cut::Status { status: status.as_u16() }, pause)
                }
                Err(error) => (Cut::Request { message: error.to_string() }, None),
            };
            if !pauses.wait(pause) && !self.interrupt.requested() {
                return Err(self.failed(UploadProblem::Failed { file: file.upload.name.clone(), cut }));
            }
        }
    }

    /// Creates the commit, which is sent as lines of JSON.
    fn commit(&self, files: &[&Prepared<'_>], message: &str) -> Result<String, HubError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Committed {
            commit_oid: String,
        }
        let mut lines =
            json!({ "key": "header", "value": { "summary": message, "description": "" } }).to_string() + "\n";
        for file in files {
            let (path, size) = (&file.upload.name, file.size);
            let entry = if file.large {
                json!({ "key": "lfsFile", "value": { "path": path, "algo": "sha256", "oid": file.sha256, "size": size } })
            } else {
                if size > LARGEST_REGULAR {
                    return Err(self.failed(UploadProblem::TooLarge { file: path.clone(), size }));
                }
                let mut content = Vec::new();
                let io = |source| HubError::Io { path: PathBuf::from(path), source };
                file.upload.content.open()?.read_to_end(&mut content).map_err(io)?;
                json!({ "key": "file", "value": { "content": STANDARD.encode(content), "path": path, "encoding": "base64" } })
            };
            lines += &format!("{entry}\n");
        }
        let url = format!("{}/api/models/{}/commit/main", self.subject.endpoint, self.subject.repo);
        let committed: Committed = self.answer(&url, "application/x-ndjson", lines.as_bytes(), false)?;
        Ok(committed.commit_oid)
    }

    /// Sends a request, with the token only if it goes to the Hub itself. It is sent again if the server is busy, and,
    /// if it is `repeatable`, if the server fails.
    fn post(&self, url: &str, kind: &str, body: &[u8], repeatable: bool) -> Result<Response<ureq::Body>, HubError> {
        let send = || {
            let mut request = self.client.agent.post(url).header(header::CONTENT_TYPE, kind);
            if kind.starts_with("application/vnd.git-lfs") {
                request = request.header(header::ACCEPT, kind);
            }
            if let Some(token) = self.client.token.as_ref().filter(|_| origin(url) == origin(self.subject.endpoint)) {
                request = request.header(header::AUTHORIZATION, token);
            }
            request.send(body)
        };
        self.client.patiently(url, repeatable, send).map_err(|error| match error {
            HubError::Interrupted { .. } => self.failed(UploadProblem::Stopped),
            error => error,
        })
    }

    fn answer<T: serde::de::DeserializeOwned>(
        &self,
        url: &str,
        kind: &str,
        body: &[u8],
        repeatable: bool,
    ) -> Result<T, HubError> {
        let text = self.answer_of(url, self.post(url, kind, body, repeatable)?)?;
        let wrong = |source| HubError::Answer { url: url.to_owned(), problem: AnswerProblem::Upload { source } };
        serde_json::from_slice(&text).map_err(wrong)
    }

    fn answer_of(&self, url: &str, response: Response<ureq::Body>) -> Result<Vec<u8>, HubError> {
        let mut response = self.client.checked(&self.subject, url, response)?;
        if response.status().is_redirection() {
            return Err(HubError::Answer { url: url.to_owned(), problem: AnswerProblem::Redirected });
        }
        let read = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        read.map_err(|e| network(url, &e))
    }

    fn failed(&self, problem: UploadProblem) -> HubError {
        HubError::Upload { repo: self.subject.repo.to_owned(), problem }
    }
}
