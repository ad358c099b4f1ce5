//! The client of the Hub, with a server on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use cl_data::{DatasetError, DatasetRef, Error, Hub, HubError};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The server's files and behaviour.
#[derive(Default)]
struct State {
    /// Bytes by revision and path.
    files: BTreeMap<(String, String), Vec<u8>>,
    /// Response to every request, if set.
    refuse: Option<(u16, &'static str)>,
    /// Response to every request for a file, if set.
    refuse_files: Option<(u16, &'static str)>,
    /// Number of downloads that end after half of the requested bytes.
    cut: usize,
    ignore_range: bool,
    /// Send content that does not match the headers.
    wrong_bytes: bool,
    log: Vec<String>,
}

#[derive(Clone)]
struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn new(files: &[(&str, &str)]) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Server { address, state: Arc::default() };
        for (path, text) in files {
            server.add("main", path, text.as_bytes());
        }
        let state = server.state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        server
    }

    fn add(&self, revision: &str, path: &str, bytes: &[u8]) {
        self.state().files.insert((revision.to_owned(), path.to_owned()), bytes.to_owned());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Returns the number of requests since the last call that start with `start`.
    fn requests(&self, start: &str) -> usize {
        self.state().log.iter().filter(|line| line.starts_with(start)).count()
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub { endpoint: self.address.clone(), cache: cache.to_owned(), token: None, offline: false }
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut request = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        request.push(line.trim_end().to_owned());
    }
    let Some(first) = request.first() else { return };
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap().to_owned());
    let header = |name: &str| {
        request.iter().find_map(|l| l.to_lowercase().strip_prefix(&format!("{name}: ")).map(str::to_owned))
    };
    let mut state = state.lock().unwrap();
    let authorization = header("authorization").unwrap_or_default();
    state.log.push(format!("{method} {path} {authorization} {}", header("range").unwrap_or_default()));
    let reply = |stream: &mut TcpStream, status: &str, headers: &str, body: &[u8], length: usize| {
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok();
    };
    let file_request = !path.starts_with("/api/");
    if let Some((status, code)) = state.refuse.or(state.refuse_files.filter(|_| file_request)) {
        return reply(&mut stream, &format!("{status} No"), &format!("X-Error-Code: {code}\r\n"), b"", 0);
    }
    if let Some(revision) = path.strip_prefix("/api/datasets/o/d/revision/") {
        let revision = revision.replace("%2F", "/");
        let of: Vec<_> = state.files.keys().filter(|(r, _)| *r == revision).collect();
        if of.is_empty() {
            return reply(&mut stream, "404 No", "X-Error-Code: RevisionNotFound\r\n", b"", 0);
        }
        let siblings: Vec<_> = of.iter().map(|(_, path)| serde_json::json!({ "rfilename": path })).collect();
        let sha = if revision == "main" { COMMIT.to_owned() } else { COMMIT.replace("0123", "4567") };
        let body = serde_json::json!({ "id": "o/d", "sha": sha, "siblings": siblings }).to_string();
        return reply(&mut stream, "200 OK", "Content-Type: application/json\r\n", body.as_bytes(), body.len());
    }
    // Large files are stored elsewhere, as on the Hub: the first response redirects there.
    let stored = path.strip_prefix("/storage/");
    let name = stored.or_else(|| path.splitn(7, '/').nth(6)).unwrap_or_default().to_owned();
    let Some(bytes) = state.files.iter().find(|((_, p), _)| *p == name).map(|(_, bytes)| bytes.clone()) else {
        return reply(&mut stream, "404 No", "X-Error-Code: RepoNotFound\r\n", b"", 0);
    };
    let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let large = name.ends_with(".jsonl");
    if large && stored.is_none() {
        let headers = format!(
            "Location: http://{}/storage/{name}\r\nX-Linked-Etag: \"{hash}\"\r\nX-Linked-Size: {}\r\nX-Repo-Commit: {COMMIT}\r\n",
            stream.local_addr().unwrap(),
            bytes.len()
        );
        return reply(&mut stream, "302 Found", &headers, b"", 0);
    }
    // Git's hash of a file.
    let named = [format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat();
    let name: String = Sha1::digest(&named).iter().map(|b| format!("{b:02x}")).collect();
    let etag = format!("ETag: W/\"{name}\"\r\nX-Repo-Commit: {COMMIT}\r\n");
    if method == "HEAD" {
        return reply(&mut stream, "200 OK", &etag, b"", bytes.len());
    }
    let body = if state.wrong_bytes { vec![b'x'; bytes.len()] } else { bytes };
    let start =
        header("range").and_then(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().ok());
    let start = start.filter(|_| !state.ignore_range);
    let rest = &body[start.unwrap_or(0)..];
    let sent = if state.cut > 0 { &rest[..rest.len() / 2] } else { rest };
    state.cut = state.cut.saturating_sub(1);
    match start {
        Some(start) => {
            let range = format!("{etag}Content-Range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len());
            reply(&mut stream, "206 Partial", &range, sent, rest.len());
        }
        None => reply(&mut stream, "200 OK", &etag, sent, rest.len()),
    }
}

fn lines(from: usize, to: usize) -> String {
    (from..to).map(|i| format!("{{\"prompt\": \"p{i}\", \"answer\": \"a{i}\"}}\n")).collect()
}

fn sharded() -> Server {
    Server::new(&[
        ("README.md", "made up"),
        ("data/train-00001-of-00002.jsonl", &lines(40, 60)),
        ("data/train-00000-of-00002.jsonl", &lines(0, 40)),
        ("data/test-00000-of-00001.json", "[{\"prompt\": \"p\", \"answer\": \"a\"}]"),
    ])
}

fn hub_error(result: Result<Vec<std::path::PathBuf>, Error>) -> HubError {
    match result.unwrap_err() {
        Error::Hub(error) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn shards_come_in_order_and_only_once() {
    let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let (file, paths) = DatasetRef::new("o/d", "train").rows(&hub).unwrap();
    let prompts: Vec<_> = file.rows.iter().map(|row| row["prompt"].as_str().unwrap().to_owned()).collect();
    assert_eq!(prompts, (0..60).map(|i| format!("p{i}")).collect::<Vec<_>>());
    let snapshot = cache.path().join("datasets--o--d/snapshots").join(COMMIT);
    assert_eq!(paths[1], snapshot.join("data/train-00001-of-00002.jsonl"));
    assert_eq!(std::fs::read_to_string(cache.path().join("datasets--o--d/refs/main")).unwrap(), COMMIT);
    let (downloads, heads) = (server.requests("GET /datasets"), server.requests("HEAD"));
    assert_eq!((downloads, heads), (2, 2));
    let again = DatasetRef::new("o/d", "train").rows(&hub).unwrap();
    assert_eq!((again.0.hash, again.1), (file.hash, paths));
    assert_eq!((server.requests("GET /datasets"), server.requests("HEAD")), (downloads, heads));
    let test = DatasetRef::new("o/d", "test").rows(&hub).unwrap();
    assert_eq!(test.0.rows.len(), 1);
}

#[test]
fn offline_after_the_cache_and_without_it() {
    let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
    let online = server.hub(cache.path());
    let offline = Hub { offline: true, ..online.clone() };
    let train = DatasetRef::new("o/d", "train");
    let error = hub_error(train.files(&offline));
    assert!(matches!(&error, HubError::Offline { repo, .. } if repo == "o/d"), "{error}");
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    assert_eq!(server.state().log.len(), 0);
    let paths = train.files(&online).unwrap();
    let sent = server.state().log.len();
    assert_eq!(train.files(&offline).unwrap(), paths);
    let commit = DatasetRef { revision: Some(COMMIT.to_owned()), ..train.clone() };
    assert_eq!(commit.files(&offline).unwrap(), paths);
    // The cached listing contains a test split, but its file was never downloaded.
    let error = hub_error(DatasetRef::new("o/d", "test").files(&offline)).to_string();
    assert!(error.contains("data/test-00000-of-00001.json"), "{error}");
    std::fs::remove_file(&paths[0]).unwrap();
    let error = hub_error(train.files(&offline)).to_string();
    assert!(error.contains("data/train-00000-of-00002.jsonl"), "{error}");
    assert_eq!(server.state().log.len(), sent);
    // Only the link was missing: the content is still cached and is not downloaded again.
    let downloads = server.requests("GET /datasets");
    assert_eq!(train.files(&online).unwrap(), paths);
    assert_eq!(server.requests("GET /datasets"), downloads);
}

#[test]
fn a_cache_that_cannot_be_written_serves_what_it_has_and_says_what_to_set_for_more() {
    let server = sharded();
    let folder = tempfile::tempdir().unwrap();
    let hub = server.hub(folder.path());
    let split = DatasetRef::new("o/d", "train");
    let paths = split.files(&hub).unwrap();
    for name in ["refs", ".listing"] {
        let own = folder.path().join("datasets--o--d").join(name);
        std::fs::remove_dir_all(&own).unwrap();
        std::fs::write(&own, "in the way").unwrap();
    }
    assert_eq!(split.files(&hub).unwrap(), paths);
    std::fs::write(folder.path().join("file"), "").unwrap();
    let error = hub_error(split.files(&server.hub(&folder.path().join("file/hub"))));
    assert!(matches!(error, HubError::Cache { .. }) && error.to_string().contains("set HF_HUB_CACHE"), "{error}");
}

#[test]
fn what_pythons_client_left_is_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let repo = cache.path().join("datasets--o--d");
    let snapshot = repo.join("snapshots").join(COMMIT).join("main");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    std::fs::write(snapshot.join("test-00000-of-00002.jsonl"), lines(0, 2)).unwrap();
    let hub = Hub { endpoint: "http://127.0.0.1:1".into(), cache: cache.path().to_owned(), token: None, offline: true };
    let error = DatasetRef::new("o/d", "test").files(&hub).unwrap_err();
    assert!(matches!(error, Error::Dataset(DatasetError::Shards { .. })), "{error}");
    std::fs::write(snapshot.join("test-00001-of-00002.jsonl"), lines(2, 3)).unwrap();
    assert_eq!(DatasetRef::new("o/d", "test").rows(&hub).unwrap().0.rows.len(), 3);
    let error = hub_error(DatasetRef::new("o/d", "train").files(&hub)).to_string();
    assert!(error.contains("there is main/test"), "{error}");
}

#[test]
fn the_endpoint_may_end_in_a_slash() {
    let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
    let hub = Hub { endpoint: format!("{}/", server.address), ..server.hub(cache.path()) };
    assert_eq!(DatasetRef::new("o/d", "train").files(&hub).unwrap().len(), 2);
    assert_eq!(server.requests("GET //"), 0);
}

#[test]
fn refusals_say_what_to_do() {
    let rows = [
        (404, "RepoNotFound", None, "has no data set o/d"),
        (401, "RepoNotFound", None, "set HF_TOKEN"),
        (401, "GatedRepo", None, "it is gated; accept its terms on its page, then set HF_TOKEN"),
        (403, "GatedRepo", Some("secret"), "with the account of HF_TOKEN"),
        (401, "", Some("secret"), "not valid"),
        (429, "", None, "HTTP 429"),
    ];
    for (status, code, token, part) in rows {
        let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
        let hub = Hub { token: token.map(str::to_owned), ..server.hub(cache.path()) };
        server.state().refuse = Some((status, code));
        let message = hub_error(DatasetRef::new("o/d", "train").files(&hub)).to_string();
        assert!(message.contains(part) && !message.contains("secret"), "{status} {code}: {message}");
        // The Hub lists the files of a gated data set, but does not serve them.
        let mut state = server.state();
        (state.refuse, state.refuse_files) = (None, Some((status, code)));
        drop(state);
        let message = hub_error(DatasetRef::new("o/d", "train").files(&hub)).to_string();
        assert!(message.contains(part), "{status} {code}: {message}");
        let sent = server.requests("GET /api/datasets/o/d/revision/main bearer secret");
        assert_eq!(sent, if token.is_some() { 2 } else { 0 });
    }
}

#[test]
fn no_network_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hub = Hub { endpoint: format!("http://{port}"), cache: cache.path().to_owned(), token: None, offline: false };
    let error = hub_error(DatasetRef::new("o/d", "train").files(&hub));
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    assert!(error.to_string().contains("HF_HUB_OFFLINE=1"), "{error}");
}

#[test]
fn a_cut_off_download_goes_on_where_it_stopped() {
    for ignore_range in [false, true] {
        let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
        let mut state = server.state();
        (state.cut, state.ignore_range) = (1, ignore_range);
        drop(state);
        let (file, _) = DatasetRef::new("o/d", "train").rows(&server.hub(cache.path())).unwrap();
        assert_eq!(file.rows.len(), 60);
        let first = lines(0, 40).len() / 2;
        assert!(server.state().log.iter().any(|line| line.ends_with(&format!("bytes={first}-"))));
    }
}

#[test]
fn a_download_that_stays_cut_off_is_never_taken_for_whole() {
    let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    server.state().cut = usize::MAX;
    let train = DatasetRef::new("o/d", "train");
    let error = hub_error(train.files(&hub));
    assert!(matches!(error, HubError::Download { .. }), "{error}");
    assert!(error.to_string().contains("interrupted after"), "{error}");
    let snapshot = cache.path().join("datasets--o--d/snapshots").join(COMMIT);
    assert!(!snapshot.join("data/train-00000-of-00002.jsonl").exists());
    let offline = Hub { offline: true, ..hub.clone() };
    assert!(matches!(hub_error(train.files(&offline)), HubError::Offline { .. }));
    server.state().cut = 0;
    server.state().log.clear();
    assert_eq!(train.rows(&hub).unwrap().0.rows.len(), 60);
    assert!(server.state().log.iter().any(|line| line.contains("bytes=")), "what came before is gone on from");
}

#[test]
fn wrong_bytes_are_noticed_and_not_kept() {
    let (server, cache) = (sharded(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    server.state().wrong_bytes = true;
    let error = hub_error(DatasetRef::new("o/d", "train").files(&hub)).to_string();
    assert!(error.contains("SHA-256"), "{error}");
    server.state().wrong_bytes = false;
    assert_eq!(DatasetRef::new("o/d", "train").rows(&hub).unwrap().0.rows.len(), 60);
}

#[test]
fn without_data_files_the_converted_branch_is_read() {
    let (server, cache) = (Server::new(&[("d.py", "a script"), ("README.md", "")]), tempfile::tempdir().unwrap());
    let parquet = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet/examples.parquet");
    let parquet = std::fs::read(parquet).unwrap();
    for path in ["c/test/0001.parquet", "c/test/0000.parquet", "e/partial-train/0000.parquet"] {
        server.add("refs/convert/parquet", path, &parquet);
    }
    let hub = server.hub(cache.path());
    let (file, paths) = DatasetRef::new("o/d", "test").rows(&hub).unwrap();
    assert_eq!((file.rows.len(), paths.len()), (6, 2));
    let offline = Hub { offline: true, ..hub.clone() };
    assert_eq!(DatasetRef::new("o/d", "test").files(&offline).unwrap(), paths);
    let partial = DatasetRef { config: Some("e".into()), ..DatasetRef::new("o/d", "train") };
    assert_eq!(partial.rows(&hub).unwrap().0.rows.len(), 3);
    let error = DatasetRef::new("o/d", "dev").files(&hub).unwrap_err();
    assert!(matches!(error, Error::Dataset(DatasetError::NoSplit { .. })), "{error}");
}

#[test]
fn splits_and_configurations_there_are_get_named() {
    let server = Server::new(&[("a/test.jsonl", &lines(0, 1)), ("b/test.jsonl", &lines(0, 2))]);
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(cache.path());
    let error = DatasetRef::new("o/d", "dev").files(&hub).unwrap_err().to_string();
    assert!(error.contains("no files of dev; it has a/test, b/test"), "{error}");
    let error = DatasetRef::new("o/d", "test").files(&hub).unwrap_err().to_string();
    assert!(error.contains("specify one of: a, b"), "{error}");
    let named = DatasetRef { config: Some("b".into()), ..DatasetRef::new("o/d", "test") };
    assert_eq!(named.rows(&hub).unwrap().0.rows.len(), 2);
}

#[test]
fn names_cannot_lead_out_of_the_cache() {
    let (server, cache) = (Server::new(&[("../../x/test.jsonl", "{}")]), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    for repo in ["../d", "a/b/c", "", "o/.."] {
        assert!(matches!(hub_error(DatasetRef::new(repo, "x").files(&hub)), HubError::Name { .. }), "{repo}");
    }
    assert_eq!(server.state().log.len(), 0);
    assert!(matches!(hub_error(DatasetRef::new("o/d", "test").files(&hub)), HubError::Name { .. }));
}
