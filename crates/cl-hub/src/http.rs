//! Requests to the Hub.
//!
//! API: <https://huggingface.co/docs/hub/api>; headers of files as read by `get_hf_file_metadata` of `huggingface_hub`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use cl_checkpoint::Interrupt;
use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Response, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::problem::{AnswerProblem, Cut, DownloadProblem};
use crate::{HubError, RepoKind};

/// Size limit for listings; those of the largest repositories have tens of megabytes.
const LARGEST_LISTING: u64 = 512 << 20;
/// Size limit for files whose size the Hub does not state.
const LARGEST_FILE: u64 = 1 << 40;
/// Number of consecutive failures after which a download is abandoned.
const ATTEMPTS: usize = 3;
/// Number of times that a request is sent if the server is busy.
const PATIENCE: u32 = 6;
/// Pause before the second attempt, doubled for each further one, unless the server states a pause.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Limit for the sum of all pauses of a request.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Time between two checks for a stop request in a pause.
const CHECK: Duration = Duration::from_millis(50);

/// The files of a repository at a commit.
#[derive(Deserialize)]
pub(crate) struct Info {
    pub(crate) sha: String,
    #[serde(default)]
    pub(crate) siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
pub(crate) struct Sibling {
    pub(crate) rfilename: String,
    /// Size in bytes; only present if it was requested.
    pub(crate) size: Option<u64>,
}

/// Metadata of a file.
pub(crate) struct Meta {
    /// Identifies the content.
    pub(crate) etag: String,
    /// Size in bytes, if known.
    pub(crate) size: Option<u64>,
}

/// The subject of a request, for error messages.
pub(crate) struct Subject<'a> {
    pub(crate) endpoint: &'a str,
    pub(crate) kind: RepoKind,
    pub(crate) repo: &'a str,
    pub(crate) revision: &'a str,
}

pub(crate) struct Client {
    pub(crate) agent: Agent,
    /// The token, as in the header.
    pub(crate) token: Option<String>,
    /// Ends pauses between attempts.
    pub(crate) interrupt: Interrupt,
}

/// The pauses between the attempts of one request.
pub(crate) struct Pauses<'a> {
    interrupt: &'a Interrupt,
    attempts: u32,
    spent: Duration,
}

impl Pauses<'_> {
    pub(crate) fn new(interrupt: &Interrupt) -> Pauses<'_> {
        Pauses { interrupt, attempts: 1, spent: Duration::ZERO }
    }

    /// Waits before the next attempt, for as long as the server asks. Returns false if there is no further attempt:
    /// after a stop request, or if the pauses would be too many or too long.
    pub(crate) fn wait(&mut self, asked: Option<Duration>) -> bool {
        let pause = asked.unwrap_or(FIRST_PAUSE * 2u32.pow(self.attempts - 1));
        self.spent = self.spent.saturating_add(pause);
        if self.attempts >= PATIENCE || self.spent > LONGEST_PAUSE {
            return false;
        }
        self.attempts += 1;
        if !pause.is_zero() {
            tracing::warn!("the server is busy; trying again in {:.1} s", pause.as_secs_f64());
        }
        let end = Instant::now() + pause;
        while !self.interrupt.requested() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(CHECK));
        }
        false
    }
}

/// Returns the pause that a server asks for in seconds; dates are not read.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    text(headers, "retry-after")?.trim().parse().ok().map(Duration::from_secs)
}

impl Client {
    pub(crate) fn new(token: Option<&str>, interrupt: &Interrupt) -> Client {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("cl-hub/", env!("CARGO_PKG_VERSION")))
            // Redirects are followed by our own code, so that the token is not sent to other addresses.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .new_agent();
        Client { agent, token: token.map(|t| format!("Bearer {t}")), interrupt: interrupt.clone() }
    }

    /// Sends a request, again after a pause if it is rejected because of its rate, or, if it is `repeatable`, because
    /// the server fails. Returns the last answer.
    pub(crate) fn patiently(
        &self,
        url: &str,
        repeatable: bool,
        send: impl Fn() -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, HubError> {
        let mut pauses = Pauses::new(&self.interrupt);
        loop {
            let response = send().map_err(|e| network(url, &e))?;
            let status = response.status();
            let again = status == 429 || (repeatable && status.is_server_error());
            if !again || !pauses.wait(retry_after(response.headers())) {
                let stopped = again && self.interrupt.requested();
                return if stopped { Err(HubError::Interrupted { url: url.to_owned() }) } else { Ok(response) };
            }
        }
    }

    /// Returns commit and files of a revision.
    pub(crate) fn info(&self, subject: &Subject) -> Result<Info, HubError> {
        let Subject { endpoint, kind, repo, revision } = subject;
        // Request file sizes, but not for data sets, which may have very many files.
        let sizes = if *kind == RepoKind::Model { "?blobs=true" } else { "" };
        let url = format!("{endpoint}/api/{}/{repo}/revision/{}{sizes}", kind.plural(), encoded(revision, false));
        let mut response = self.checked(subject, &url, self.get(endpoint, &url, None)?)?;
        let listing = |source| HubError::Answer { url: url.clone(), problem: AnswerProblem::Listing { source } };
        let text = response.body_mut().with_config().limit(LARGEST_LISTING).read_to_vec();
        let text = text.map_err(|e| network(&url, &e))?;
        serde_json::from_slice(&text).map_err(listing)
    }

    /// Sends a request and follows redirects. The token is sent only to the Hub's own address (scheme, host and port),
    /// and not to the storage of large files.
    fn get(&self, endpoint: &str, url: &str, range: Option<&str>) -> Result<Response<Body>, HubError> {
        self.patiently(url, true, || self.get_once(endpoint, url, range))
    }

    fn get_once(&self, endpoint: &str, url: &str, range: Option<&str>) -> Result<Response<Body>, ureq::Error> {
        let mut at = url.to_owned();
        for _ in 0..10 {
            let mut request = self.agent.get(&at).header(header::ACCEPT_ENCODING, "identity");
            if let Some(token) = self.token.as_ref().filter(|_| origin(&at) == origin(endpoint)) {
                request = request.header(header::AUTHORIZATION, token);
            }
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            let response = request.call()?;
            match text(response.headers(), "location").filter(|_| response.status().is_redirection()) {
                Some(to) if to.starts_with('/') => at = format!("{}{to}", origin(&at)),
                Some(to) => at = to,
                None => return Ok(response),
            }
        }
        Err(ureq::Error::TooManyRedirects)
    }

    /// Requests a file's headers from the Hub itself, not from the storage that it redirects to. Only redirects within
    /// the Hub, as for renamed repositories, are followed.
    pub(crate) fn head(&self, subject: &Subject, url: &str) -> Result<Meta, HubError> {
        let mut at = url.to_owned();
        for _ in 0..5 {
            let answer = self.patiently(&at, true, || {
                let mut request = self.agent.head(&at).header(header::ACCEPT_ENCODING, "identity");
                if let Some(token) = &self.token {
                    request = request.header(header::AUTHORIZATION, token);
                }
                request.call()
            });
            let response = self.checked(subject, &at, answer?)?;
            let headers = response.headers();
            match text(headers, "location") {
                Some(to) if response.status().is_redirection() && to.starts_with('/') => {
                    at = format!("{}{to}", origin(subject.endpoint));
                }
                _ => return meta(headers, response.status().is_redirection(), &at),
            }
        }
        Err(HubError::Answer { url: url.to_owned(), problem: AnswerProblem::Redirects })
    }

    /// Downloads a file, resuming an earlier download, until its size and hash are correct. Stops if requested.
    pub(crate) fn download(
        &self,
        subject: &Subject,
        url: &str,
        meta: &Meta,
        to: &Path,
        interrupt: &Interrupt,
    ) -> Result<(), HubError> {
        let io = |source| HubError::Io { path: to.to_owned(), source };
        let mut progress = Progress::new(url, meta.size);
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(to).map_err(io)?;
        let mut failures = 0;
        loop {
            let before = file.metadata().map_err(io)?.len();
            if meta.size.is_some_and(|size| before > size) {
                file.set_len(0).map_err(io)?;
            }
            let done = if meta.size == Some(before) {
                Ok(())
            } else {
                self.receive(subject, url, meta, &mut file, &mut progress, interrupt)
            };
            let length = file.metadata().map_err(io)?.len();
            if interrupt.requested() {
                file.sync_all().map_err(io)?;
                return Err(HubError::Interrupted { url: url.to_owned() });
            }
            match done {
                Ok(()) => break,
                // The request was already repeated.
                Err(Received::Cut(cut @ Cut::Status { .. })) => {
                    let problem = DownloadProblem::Interrupted { received: length, size: meta.size, cut };
                    return Err(HubError::Download { url: url.to_owned(), problem });
                }
                // Some data arrived, so retry.
                Err(Received::Cut(_)) if length > before || failures + 1 < ATTEMPTS => {
                    failures = if length > before { 0 } else { failures + 1 };
                }
                Err(Received::Cut(cut)) => {
                    let problem = DownloadProblem::Interrupted { received: length, size: meta.size, cut };
                    return Err(HubError::Download { url: url.to_owned(), problem });
                }
                Err(Received::Refused(error)) => return Err(error),
                Err(Received::Disk(source)) => return Err(io(source)),
            }
        }
        file.sync_all().map_err(io)?;
        if let Err(problem) = verify(&mut file, meta).map_err(io)? {
            // Do not resume a download whose content is wrong.
            file.set_len(0).map_err(io)?;
            return Err(HubError::Download { url: url.to_owned(), problem });
        }
        Ok(())
    }

    /// Sends one request for the missing part of a file.
    fn receive(
        &self,
        subject: &Subject,
        url: &str,
        meta: &Meta,
        file: &mut File,
        progress: &mut Progress,
        interrupt: &Interrupt,
    ) -> Result<(), Received> {
        let start = file.metadata().map_err(Received::Disk)?.len();
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let response = match self.get(subject.endpoint, url, range.as_deref()) {
            Ok(response) if response.status() == 416 => {
                file.set_len(0).map_err(Received::Disk)?;
                return Err(Received::Cut(Cut::NoRange));
            }
            Ok(response) if response.status().is_server_error() => {
                return Err(Received::Cut(Cut::Status { status: response.status().as_u16() }));
            }
            Err(HubError::Network { message, .. }) => return Err(Received::Cut(Cut::Request { message })),
            Err(error) => return Err(Received::Refused(error)),
            Ok(response) => self.checked(subject, url, response).map_err(Received::Refused)?,
        };
        // A server that ignores the range sends the whole file.
        let range = text(response.headers(), "content-range").unwrap_or_default();
        let resumed = response.status() == 206 && range.starts_with(&format!("bytes {start}-"));
        if !resumed {
            if response.status() == 206 {
                file.set_len(0).map_err(Received::Disk)?;
                return Err(Received::Cut(Cut::Range { range }));
            }
            file.set_len(0).map_err(Received::Disk)?;
        }
        file.seek(SeekFrom::End(0)).map_err(Received::Disk)?;
        // One byte more than announced is enough to detect that the file is a different one.
        let start = file.metadata().map_err(Received::Disk)?.len();
        let most = meta.size.map_or(LARGEST_FILE, |size| size.saturating_sub(start) + 1);
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader().take(most);
        let mut buffer = vec![0; 1 << 16];
        let mut arrived = start;
        while !interrupt.requested() {
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    file.write_all(&buffer[..n]).map_err(Received::Disk)?;
                    arrived += n as u64;
                    progress.arrived(arrived);
                }
                Err(error) => return Err(Received::Cut(Cut::Request { message: error.to_string() })),
            }
        }
        let length = file.metadata().map_err(Received::Disk)?.len();
        match meta.size {
            Some(size) if length < size => Err(Received::Cut(Cut::Ended)),
            _ => Ok(()),
        }
    }

    /// Returns the response if it is not an error.
    pub(crate) fn checked(
        &self,
        subject: &Subject,
        url: &str,
        response: Response<Body>,
    ) -> Result<Response<Body>, HubError> {
        let status = response.status().as_u16();
        let code = text(response.headers(), "x-error-code").unwrap_or_default();
        let has_token = self.token.is_some();
        let not_found = |hint| HubError::NotFound {
            kind: subject.kind,
            repo: subject.repo.to_owned(),
            revision: subject.revision.to_owned(),
            endpoint: subject.endpoint.to_owned(),
            hint,
        };
        match status {
            200..=399 => Ok(response),
            // Without a token, a private repository looks like a missing one.
            401 if code == "RepoNotFound" && !has_token => {
                Err(not_found("; if it is private, set HF_TOKEN to a token with access"))
            }
            404 if code == "EntryNotFound" => {
                Err(HubError::Answer { url: url.to_owned(), problem: AnswerProblem::NoFile })
            }
            404 => Err(not_found(if code == "RevisionNotFound" {
                " (the repository exists, but not the revision)"
            } else {
                ""
            })),
            401 | 403 => {
                let hint = match (code.as_str(), has_token) {
                    ("GatedRepo", true) => "it is gated; accept its terms on its page with the account of HF_TOKEN",
                    ("GatedRepo", false) => {
                        "it is gated; accept its terms on its page, then set HF_TOKEN to your token"
                    }
                    (_, true) => "HF_TOKEN has no access to it, or is not valid",
                    (_, false) => "it is private or gated; set HF_TOKEN to a token with access",
                };
                Err(HubError::Access { repo: subject.repo.to_owned(), status, hint })
            }
            429 => {
                let seconds = retry_after(response.headers()).map(|pause| pause.as_secs()).filter(|pause| *pause > 0);
                let problem = AnswerProblem::RateLimited { seconds, has_token };
                Err(HubError::Answer { url: url.to_owned(), problem })
            }
            500..=599 => Err(HubError::Answer { url: url.to_owned(), problem: AnswerProblem::Unavailable { status } }),
            _ => Err(HubError::Answer { url: url.to_owned(), problem: AnswerProblem::Status { status } }),
        }
    }
}

/// Why a request for a file ended early.
enum Received {
    /// The request may be retried.
    Cut(Cut),
    /// The Hub rejected the request.
    Refused(HubError),
    /// Writing to disk failed.
    Disk(io::Error),
}

pub(crate) fn network(url: &str, error: &ureq::Error) -> HubError {
    HubError::Network { url: url.to_owned(), message: error.to_string() }
}

fn meta(headers: &HeaderMap, redirected: bool, url: &str) -> Result<Meta, HubError> {
    let answer = |problem| HubError::Answer { url: url.to_owned(), problem };
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
    let etag = etag.ok_or_else(|| answer(AnswerProblem::NoEtag))?;
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
    if etag.is_empty() || !etag.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
        return Err(answer(AnswerProblem::Etag));
    }
    // The length of a redirect is that of its own body.
    let length = text(headers, "content-length").filter(|_| !redirected);
    let size = text(headers, "x-linked-size").or(length);
    Ok(Meta { etag, size: size.and_then(|s| s.parse().ok()) })
}

pub(crate) fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Returns scheme and host of an address.
pub(crate) fn origin(endpoint: &str) -> &str {
    let host = endpoint.find("://").map_or(0, |at| at + 3);
    endpoint[host..].find('/').map_or(endpoint, |at| &endpoint[..host + at])
}

/// Percent-encodes a part of a URL, optionally keeping slashes.
pub(crate) fn encoded(name: &str, slashes: bool) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (slashes && byte == b'/') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Verifies size and hash; the inner error describes the mismatch.
fn verify(file: &mut File, meta: &Meta) -> io::Result<Result<(), DownloadProblem>> {
    let length = file.metadata()?.len();
    if let Some(size) = meta.size.filter(|size| *size != length) {
        return Ok(Err(DownloadProblem::Size { received: length, size }));
    }
    // The etag is SHA-256 for large files and Git's SHA-1 for small ones; mirrors may use other names.
    if !meta.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(Ok(()));
    }
    file.rewind()?;
    let (kind, found) = match meta.etag.len() {
        64 => ("SHA-256", sha256(file)?),
        40 => ("SHA-1", git_sha1(file, length)?),
        _ => return Ok(Ok(())),
    };
    let same = found == meta.etag.to_ascii_lowercase();
    Ok(if same { Ok(()) } else { Err(DownloadProblem::Hash { kind, found, expected: meta.etag.clone() }) })
}

/// Computes the hexadecimal SHA-256 hash of the content.
pub(crate) fn sha256(content: &mut impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(content, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

/// Computes Git's SHA-1 hash of a file with this length.
pub(crate) fn git_sha1(content: &mut impl Read, length: u64) -> io::Result<String> {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {length}\0"));
    io::copy(content, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reports the progress of a download every few seconds.
struct Progress {
    name: String,
    size: Option<u64>,
    said: Instant,
}

/// Minimum size in bytes of files whose download is reported.
const WORTH_SAYING: u64 = 1_000_000;
/// Time between two progress messages.
const SAY: Duration = Duration::from_secs(10);

impl Progress {
    fn new(url: &str, size: Option<u64>) -> Progress {
        let name = url.rsplit('/').next().unwrap_or(url).to_owned();
        let repo = url.split("/resolve/").next().unwrap_or_default().rsplit('/').take(2).collect::<Vec<_>>();
        let repo = repo.into_iter().rev().collect::<Vec<_>>().join("/");
        let bytes = size.map_or(String::new(), |size| format!(", {:.1} MB", size as f64 / 1e6));
        if size.is_none_or(|size| size >= WORTH_SAYING) {
            tracing::info!("downloading {name} of {repo}{bytes}");
        }
        Progress { name, size, said: Instant::now() }
    }

    fn arrived(&mut self, bytes: u64) {
        if self.said.elapsed() < SAY {
            return;
        }
        self.said = Instant::now();
        let whole = self.size.map_or(String::new(), |size| format!(" of {:.1}", size as f64 / 1e6));
        tracing::info!("{}: {:.1}{whole} MB", self.name, bytes as f64 / 1e6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_bounded_and_end_with_a_stop_request() {
        let interrupt = Interrupt::default();
        let mut pauses = Pauses::new(&interrupt);
        let at_once = Some(Duration::ZERO);
        assert_eq!((0..10).filter(|_| pauses.wait(at_once)).count(), PATIENCE as usize - 1);
        assert!(!Pauses::new(&interrupt).wait(Some(LONGEST_PAUSE + CHECK)));
        assert!(!Pauses::new(&interrupt).wait(Some(Duration::MAX)));
        let stop = interrupt.clone();
        let stopping = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            stop.request();
        });
        assert!(!Pauses::new(&interrupt).wait(Some(Duration::from_secs(50))));
        stopping.join().unwrap();
        // All pauses together, if the server states none.
        let whole: Duration = (0..PATIENCE - 1).map(|attempt| FIRST_PAUSE * 2u32.pow(attempt)).sum();
        assert!(whole <= LONGEST_PAUSE);
    }

    #[test]
    fn hashes_of_git() {
        // printf 'hello\n' | git hash-object --stdin
        assert_eq!(git_sha1(&mut &b"hello\n"[..], 6).unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
