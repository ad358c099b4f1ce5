//! A Hub server on this machine, for tests: model repositories, and a storage at a separate address.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use cl_checkpoint::Interrupt;
use cl_hub::Hub;
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Commit of a repository whose files were never changed; each commit increments its last digit.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234560";

/// A repository.
#[derive(Default)]
pub struct Remote {
    pub files: BTreeMap<String, Vec<u8>>,
    pub commits: usize,
    pub private: bool,
    /// Branches other than main; they start from the first commit.
    pub revisions: Vec<String>,
}

impl Remote {
    pub fn commit(&self) -> String {
        format!("{}{:x}", &COMMIT[..39], self.commits)
    }
}

/// The server's data and behaviour.
#[derive(Default)]
pub struct State {
    pub repos: BTreeMap<String, Remote>,
    /// Large files that were uploaded, by hash.
    pub stored: BTreeMap<String, Vec<u8>>,
    /// Parts of a large file, by hash and number.
    parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Number of downloads that end after half of the requested bytes.
    pub cut: usize,
    /// Send content that does not match the headers.
    pub wrong_bytes: bool,
    /// If set, large uploads are split into parts of this size.
    pub part_size: Option<usize>,
    /// Whether requests to the storage fail from now on.
    pub refuse_storage: bool,
    /// Number of requests that are answered with `busy_status` from now on.
    pub busy: usize,
    /// Number of requests after which a single one is answered with `busy_status`.
    pub busy_at: Option<usize>,
    /// A status such as `429 Wait`.
    pub busy_status: &'static str,
    /// The pause in seconds that these answers ask for.
    pub retry_after: u64,
    /// The token required for writing.
    pub token: String,
    /// Method, path, authorization and range of every request.
    pub log: Vec<String>,
}

/// The server.
#[derive(Clone)]
pub struct Server {
    pub address: String,
    pub storage: String,
    pub state: Arc<Mutex<State>>,
}

/// A received request.
struct Request {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

struct Answer {
    status: &'static str,
    headers: String,
    body: Vec<u8>,
    length: usize,
}

impl Answer {
    fn new(status: &'static str, headers: String, body: Vec<u8>) -> Answer {
        let length = body.len();
        Answer { status, headers, body, length }
    }

    fn json(value: &Value) -> Answer {
        Answer::new("200 OK", "Content-Type: application/json\r\n".to_owned(), value.to_string().into_bytes())
    }

    fn error(status: &'static str, code: &str) -> Answer {
        Answer::new(status, format!("X-Error-Code: {code}\r\n"), Vec::new())
    }
}

impl Server {
    /// Answers every further request with a status and a pause of 50 seconds.
    pub fn stay_busy(&self, status: &'static str) {
        let mut state = self.state();
        (state.busy, state.busy_status, state.retry_after) = (usize::MAX, status, 50);
    }

    /// Waits for the first request, and then requests a stop.
    pub fn stop_at_first_request(&self, interrupt: &Interrupt) {
        while self.requests("") == 0 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        interrupt.request();
    }

    pub fn new() -> Server {
        let listen = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            (listener, address)
        };
        let ((hub, address), (store, storage)) = (listen(), listen());
        let server = Server { address, storage, state: Arc::default() };
        for (listener, is_storage) in [(hub, false), (store, true)] {
            let server = server.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let server = server.clone();
                    std::thread::spawn(move || server.serve(stream, is_storage));
                }
            });
        }
        server
    }

    /// Adds a file to a model's repository.
    pub fn add(&self, repo: &str, path: &str, bytes: &[u8]) {
        self.state().repos.entry(repo.to_owned()).or_default().files.insert(path.to_owned(), bytes.to_owned());
    }

    /// Adds the files of a directory.
    pub fn add_dir(&self, repo: &str, dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap().flatten().filter(|e| e.path().is_file()) {
            self.add(repo, &entry.file_name().to_string_lossy(), &std::fs::read(entry.path()).unwrap());
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Returns the number of requests that start with `start`.
    pub fn requests(&self, start: &str) -> usize {
        self.state().log.iter().filter(|line| line.starts_with(start)).count()
    }

    /// Returns a client with this cache.
    pub fn hub(&self, cache: &Path) -> Hub {
        Hub { endpoint: self.address.clone(), cache: cache.to_owned(), token: None, offline: false }
    }

    /// Answers one request and closes the connection.
    fn serve(&self, mut stream: TcpStream, is_storage: bool) {
        let Some(request) = read_request(&mut stream) else { return };
        let mut state = self.state();
        let place = if is_storage { "storage " } else { "" };
        let authorization = request.header("authorization").unwrap_or_default();
        let range = request.header("range").unwrap_or_default();
        state.log.push(format!("{place}{} {} {authorization} {range}", request.method, request.path));
        let is_busy = state.busy > 0 || state.busy_at == Some(0);
        state.busy_at = state.busy_at.and_then(|left| left.checked_sub(1));
        state.busy = state.busy.saturating_sub(1);
        let pause = format!("Retry-After: {}\r\n", state.retry_after);
        let answer = match (is_storage, request.method.as_str()) {
            _ if is_busy => Answer::new(state.busy_status, pause, Vec::new()),
            (true, _) if state.refuse_storage => Answer::new("503 Busy", pause, Vec::new()),
            (true, "PUT") => put(&mut state, &request),
            (true, "POST") => complete(&mut state, &request),
            (true, _) => self.stored(&mut state, &request),
            (false, "POST") => self.post(&mut state, &request),
            (false, _) => self.get(&mut state, &request),
        };
        drop(state);
        let Answer { status, headers, body, length } = answer;
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
        let body = if request.method == "HEAD" { &[][..] } else { &body };
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok();
    }

    fn get(&self, state: &mut State, request: &Request) -> Answer {
        if let Some(rest) = request.path.strip_prefix("/api/models/") {
            let Some((repo, revision)) = rest.split_once("/revision/") else { return Answer::error("404 No", "") };
            let revision = revision.trim_end_matches("?blobs=true").replace("%2F", "/");
            let Some(remote) = state.repos.get(repo) else { return Answer::error("404 No", "RepoNotFound") };
            if revision != "main" && revision != remote.commit() && !remote.revisions.contains(&revision) {
                return Answer::error("404 No", "RevisionNotFound");
            }
            let sibling = |(path, bytes): (&String, &Vec<u8>)| json!({ "rfilename": path, "size": bytes.len() });
            let siblings: Vec<Value> = remote.files.iter().map(sibling).collect();
            return Answer::json(&json!({ "id": repo, "sha": remote.commit(), "siblings": siblings }));
        }
        let Some((repo, rest)) = request.path.trim_start_matches('/').split_once("/resolve/") else {
            return Answer::error("404 No", "");
        };
        let name = rest.split_once('/').map_or("", |(_, name)| name);
        let Some(bytes) = state.repos.get(repo).and_then(|r| r.files.get(name)).cloned() else {
            return Answer::error("404 No", "EntryNotFound");
        };
        if is_large(name) {
            let (hash, size) = (sha256(&bytes), bytes.len());
            state.stored.insert(hash.clone(), bytes);
            let headers =
                format!("Location: {}/{hash}\r\nX-Linked-Etag: \"{hash}\"\r\nX-Linked-Size: {size}\r\n", self.storage);
            return Answer::new("302 Found", headers, Vec::new());
        }
        send(state, request, bytes.clone(), &format!("ETag: \"{}\"\r\n", git_sha1(&bytes)))
    }

    fn stored(&self, state: &mut State, request: &Request) -> Answer {
        match state.stored.get(request.path.trim_start_matches('/')).cloned() {
            Some(bytes) => send(state, request, bytes, "ETag: \"of the storage\"\r\n"),
            None => Answer::error("404 No", ""),
        }
    }

    fn post(&self, state: &mut State, request: &Request) -> Answer {
        if request.header("authorization") != Some(&format!("Bearer {}", state.token)) {
            return Answer::error("401 No", "");
        }
        let body = || serde_json::from_slice::<Value>(&request.body).unwrap();
        if request.path == "/api/repos/create" {
            let body = body();
            let repo = format!("{}/{}", body["organization"].as_str().unwrap(), body["name"].as_str().unwrap());
            if state.repos.contains_key(&repo) {
                return Answer::error("409 Conflict", "");
            }
            let private = body["private"] == true;
            state.repos.insert(repo.clone(), Remote { private, ..Remote::default() });
            return Answer::json(&json!({ "url": format!("{}/{repo}", self.address) }));
        }
        if let Some(repo) = request.path.trim_start_matches('/').strip_suffix(".git/info/lfs/objects/batch") {
            assert!(state.repos.contains_key(repo), "{repo}");
            return self.batch(state, &body());
        }
        if request.path == "/verify" {
            let body = body();
            let stored = state.stored.get(body["oid"].as_str().unwrap()).map(Vec::len);
            let right = stored == body["size"].as_u64().map(|size| size as usize);
            return if right { Answer::json(&json!({})) } else { Answer::error("422 No", "") };
        }
        let Some((repo, action)) =
            request.path.strip_prefix("/api/models/").and_then(|rest| rest.strip_suffix("/main")?.rsplit_once('/'))
        else {
            return Answer::error("404 No", "");
        };
        let Some(remote) = state.repos.get_mut(repo) else { return Answer::error("404 No", "RepoNotFound") };
        match action {
            "preupload" => {
                let file = |file: &Value| {
                    let path = file["path"].as_str().unwrap();
                    let large = is_large(path);
                    let oid = remote.files.get(path).map(|b| if large { sha256(b) } else { git_sha1(b) });
                    json!({ "path": path, "uploadMode": if large { "lfs" } else { "regular" }, "oid": oid, "shouldIgnore": false })
                };
                let files: Vec<Value> = body()["files"].as_array().unwrap().iter().map(file).collect();
                Answer::json(&json!({ "files": files }))
            }
            "commit" => {
                let text = String::from_utf8(request.body.clone()).unwrap();
                for line in text.lines() {
                    let entry: Value = serde_json::from_str(line).unwrap();
                    let value = &entry["value"];
                    let path = || value["path"].as_str().unwrap().to_owned();
                    match entry["key"].as_str().unwrap() {
                        "header" => assert!(!value["summary"].as_str().unwrap().is_empty()),
                        "file" => {
                            assert_eq!(value["encoding"], "base64");
                            remote.files.insert(path(), from_base64(value["content"].as_str().unwrap()));
                        }
                        "lfsFile" => {
                            let stored = state.stored.get(value["oid"].as_str().unwrap()).expect("uploaded first");
                            assert_eq!(value["size"].as_u64().unwrap() as usize, stored.len());
                            remote.files.insert(path(), stored.clone());
                        }
                        other => panic!("{other}"),
                    }
                }
                remote.commits += 1;
                Answer::json(&json!({ "success": true, "commitOid": remote.commit(), "commitUrl": "" }))
            }
            _ => Answer::error("404 No", ""),
        }
    }

    /// Git LFS' batch API, with the Hub's multipart transfers.
    fn batch(&self, state: &State, body: &Value) -> Answer {
        assert_eq!(body["operation"], "upload");
        let object = |object: &Value| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
            let mut answer = json!({ "oid": oid, "size": size });
            if state.stored.contains_key(oid) {
                return answer;
            }
            let upload = match state.part_size.filter(|part| size > *part) {
                None => json!({ "href": format!("{}/upload/{oid}", self.storage), "header": { "X-Signed": "yes" } }),
                Some(part) => {
                    let mut header = json!({ "chunk_size": part.to_string() });
                    for number in 1..=size.div_ceil(part) {
                        header[format!("{number:05}")] = json!(format!("{}/upload/{oid}?part={number}", self.storage));
                    }
                    json!({ "href": format!("{}/complete/{oid}", self.storage), "header": header })
                }
            };
            let verify = json!({ "href": format!("{}/verify", self.address) });
            answer["actions"] = json!({ "upload": upload, "verify": verify });
            answer
        };
        let objects: Vec<Value> = body["objects"].as_array().unwrap().iter().map(object).collect();
        Answer::json(&json!({ "transfer": "multipart", "objects": objects }))
    }
}

/// Whether a file is large, by the Hub's rule for these extensions.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

/// Handles an upload to the storage: a file, or a part of it.
fn put(state: &mut State, request: &Request) -> Answer {
    let Some(rest) = request.path.strip_prefix("/upload/") else { return Answer::error("404 No", "") };
    match rest.split_once("?part=") {
        None if request.header("x-signed") == Some("yes") && sha256(&request.body) == rest => {
            state.stored.insert(rest.to_owned(), request.body.clone());
            Answer::new("200 OK", String::new(), Vec::new())
        }
        None => Answer::error("403 No", ""),
        Some((oid, number)) => {
            let etag = sha256(&request.body);
            state.parts.insert((oid.to_owned(), number.parse().unwrap()), request.body.clone());
            Answer::new("200 OK", format!("ETag: \"{etag}\"\r\n"), Vec::new())
        }
    }
}

/// Handles the end of an upload in parts.
fn complete(state: &mut State, request: &Request) -> Answer {
    let Some(oid) = request.path.strip_prefix("/complete/") else { return Answer::error("404 No", "") };
    let body: Value = serde_json::from_slice(&request.body).unwrap();
    assert_eq!(body["oid"], oid);
    let mut whole = Vec::new();
    for part in body["parts"].as_array().unwrap() {
        let number = part["partNumber"].as_u64().unwrap() as usize;
        let bytes = &state.parts[&(oid.to_owned(), number)];
        assert_eq!(part["etag"].as_str().unwrap().trim_matches('"'), sha256(bytes));
        whole.extend_from_slice(bytes);
    }
    if sha256(&whole) != oid {
        return Answer::error("400 No", "");
    }
    state.stored.insert(oid.to_owned(), whole);
    Answer::json(&json!({}))
}

fn send(state: &mut State, request: &Request, bytes: Vec<u8>, etag: &str) -> Answer {
    let body = if state.wrong_bytes { vec![b'x'; bytes.len()] } else { bytes };
    if request.method == "HEAD" {
        return Answer { status: "200 OK", headers: etag.to_owned(), length: body.len(), body: Vec::new() };
    }
    let range = request.header("range");
    let start = range.and_then(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().ok());
    let rest = &body[start.unwrap_or(0)..];
    let sent = if state.cut > 0 { &rest[..rest.len() / 2] } else { rest };
    state.cut = state.cut.saturating_sub(1);
    let content_range =
        start.map(|start| format!("Content-Range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len()));
    Answer {
        status: if start.is_some() { "206 Partial" } else { "200 OK" },
        headers: format!("{etag}{}", content_range.unwrap_or_default()),
        length: rest.len(),
        body: sent.to_owned(),
    }
}

fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request { method, path, headers, body: Vec::new() };
    if request.header("expect").is_some() {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let length = request.header("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    request.body = vec![0; length];
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Git's hash of a file.
pub fn git_sha1(bytes: &[u8]) -> String {
    let named = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    Sha1::digest(&named).iter().map(|b| format!("{b:02x}")).collect()
}

fn from_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter(|b| *b != b'=').map(|b| ALPHABET.iter().position(|a| *a == b).unwrap() as u32);
    let (mut out, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in digits {
        bits = (bits << 6 | digit) & 0xffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}
