//! Tasks whose rows are fetched from a Hub server on this machine.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cl_data::Hub;
use cl_eval::{Error, Request, Task, TaskOptions, TaskSet, load_task, load_tasks};
use serde_json::json;
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

const ARC: &str = r#"{"id": "1", "question": "What is wet?", "choices": {"text": ["sand", "rain"], "label": ["A", "B"]}, "answerKey": "B"}
"#;
const SHOT: &str = r#"{"id": "2", "question": "What is dry?", "choices": {"text": ["sand", "rain"], "label": ["A", "B"]}, "answerKey": "A"}
"#;

/// Bytes by data set and file.
type Files = BTreeMap<(String, String), Vec<u8>>;

/// A Hub server, a data directory that is initially empty, and a cache.
struct Place {
    folder: TempDir,
    hub: Hub,
    requests: Arc<AtomicUsize>,
}

impl Place {
    fn new(files: Files) -> Place {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("data")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counter.fetch_add(1, Ordering::SeqCst);
                answer(stream, &files);
            }
        });
        let hub = Hub { endpoint, cache: folder.path().join("cache"), token: None, offline: false };
        Place { folder, hub, requests }
    }

    fn arc() -> Place {
        let file = |name: &str, text: &str| {
            (("allenai/ai2_arc".to_owned(), format!("ARC-Challenge/{name}.jsonl")), text.as_bytes().to_vec())
        };
        Place::new([file("test", ARC), file("train", SHOT)].into())
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn options(&self) -> TaskOptions<'_> {
        TaskOptions { num_fewshot: Some(1), hub: Some(&self.hub), ..TaskOptions::default() }
    }

    fn load(&self, name: &str) -> Result<Box<dyn Task>, Error> {
        load_task(name, &self.data(), self.options())
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, files: &Files) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut line) = (String::new(), String::new());
    reader.read_line(&mut first).unwrap();
    while reader.read_line(&mut line).unwrap_or(0) > 0 && line != "\r\n" {
        line.clear();
    }
    let words: Vec<&str> = first.split(' ').collect();
    let (head, path) = (words[0] == "HEAD", words[1]);
    let found = files.iter().find_map(|((repo, file), bytes)| {
        if path == format!("/api/datasets/{repo}/revision/main") {
            let of_repo = files.keys().filter(|(r, _)| r == repo);
            let siblings: Vec<_> = of_repo.map(|(_, file)| json!({ "rfilename": file })).collect();
            return Some(json!({ "id": repo, "sha": COMMIT, "siblings": siblings }).to_string().into_bytes());
        }
        (path == format!("/datasets/{repo}/resolve/{COMMIT}/{file}")).then(|| bytes.clone())
    });
    let (status, body) = found.map_or(("404 No", Vec::new()), |b| ("200 OK", b));
    let etag = BuildHasherDefault::<DefaultHasher>::default().hash_one(&body);
    let headers = format!("ETag: \"{etag:016x}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {}\r\n", body.len());
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n").unwrap();
    stream.write_all(if head { b"" } else { &body }).unwrap();
}

fn choices(task: &dyn Task) -> Vec<(String, String)> {
    let Request::Loglikelihood(asked) = task.request(0) else { panic!("asks for texts") };
    asked.into_iter().map(|r| (r.context, r.continuation)).collect()
}

#[test]
fn rows_come_from_the_hub_and_the_record_says_so() {
    let place = Place::arc();
    let task = place.load("arc_challenge").unwrap();
    let expected = "Question: What is dry?\nAnswer: sand\n\nQuestion: What is wet?\nAnswer:";
    assert_eq!(choices(task.as_ref())[1], (expected.to_owned(), " rain".to_owned()));
    let snapshot = place.hub.cache.join("datasets--allenai--ai2_arc/snapshots").join(COMMIT).join("ARC-Challenge");
    let record = |split: &str, text: &str| {
        json!({
            "repo": "allenai/ai2_arc", "config": "ARC-Challenge", "split": split, "revision": COMMIT,
            "paths": [snapshot.join(format!("{split}.jsonl"))],
            "blake3": blake3::hash(text.as_bytes()).to_hex().to_string(),
        })
    };
    assert_eq!(task.settings()["files"], json!([record("test", ARC), record("train", SHOT)]));
}

#[test]
fn offline_nothing_is_asked_for() {
    let mut place = Place::arc();
    let request = place.load("arc_challenge").unwrap().request(0);
    let before = place.requests();
    place.hub.offline = true;
    assert_eq!(place.load("arc_challenge").unwrap().request(0), request);
    place.hub.cache = place.folder.path().join("empty");
    let error = place.load("arc_challenge").err().unwrap();
    assert!(matches!(error, Error::Fetch { .. }), "{error}");
    let error = error.to_string();
    for part in
        ["arc_challenge/test.jsonl", "allenai/ai2_arc (configuration ARC-Challenge, split test)", "HF_HUB_OFFLINE"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(place.requests(), before);
}

#[test]
fn local_files_win() {
    let place = Place::arc();
    let folder = place.data().join("arc_challenge");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("test.jsonl"), ARC.replace("rain", "snow")).unwrap();
    std::fs::write(folder.join("fewshot.jsonl"), SHOT).unwrap();
    let task = place.load("arc_challenge").unwrap();
    assert_eq!(choices(task.as_ref())[1].1, " snow");
    assert_eq!(task.settings()["files"][0]["path"], json!(folder.join("test.jsonl")));
    assert_eq!(place.requests(), 0);
    // Only the missing file, with the few-shot examples, is fetched.
    std::fs::remove_file(folder.join("fewshot.jsonl")).unwrap();
    let task = place.load("arc_challenge").unwrap();
    assert_eq!(choices(task.as_ref())[1].1, " snow");
    assert_eq!(task.settings()["files"][1]["split"], "train");
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Collects the files below `folder`, by relative path.
fn walk(folder: &Path, prefix: &str, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.path().is_dir() {
            walk(&entry.path(), &format!("{name}/"), found);
        } else {
            found.push((name, std::fs::read(entry.path()).unwrap()));
        }
    }
}

/// Returns the files written by `make_hub.py`, and GSM8K as JSONL.
fn harness_datasets() -> Files {
    let mut found = Vec::new();
    walk(&fixtures().join("hub"), "", &mut found);
    for split in ["train", "test"] {
        let bytes = std::fs::read(fixtures().join(format!("requests/gsm8k/{split}.jsonl"))).unwrap();
        found.push((format!("openai/gsm8k/main/{split}.jsonl"), bytes));
    }
    let split = |(path, bytes): (String, Vec<u8>)| {
        let at = path.match_indices('/').nth(1).unwrap().0;
        ((path[..at].to_owned(), path[at + 1..].to_owned()), bytes)
    };
    found.into_iter().map(split).collect()
}

/// Repositories, configurations and splits are those of lm-eval; `requests.rs` compares the requests for local files
/// with lm-eval's.
#[test]
fn parquet_of_the_hub_gives_the_requests_of_local_files() {
    let place = Place::new(harness_datasets());
    let names = ["arc_challenge", "commonsense_qa", "hellaswag", "openbookqa", "piqa", "winogrande", "gsm8k"];
    let more = ["arc_easy", "boolq", "copa", "logiqa", "mathqa", "rte", "sciq", "social_iqa"];
    let truthful = ["truthfulqa_mc1", "truthfulqa_mc2"];
    let subjects = ["mmlu_abstract_algebra", "mmlu_high_school_us_history", "mmlu_virology"];
    for name in names.into_iter().chain(more).chain(truthful).chain(subjects) {
        let fetched = place.load(name).unwrap_or_else(|e| panic!("{e}"));
        let options = TaskOptions { hub: None, ..place.options() };
        let local = load_task(name, &fixtures().join("requests"), options).unwrap();
        assert_eq!((fetched.name(), fetched.len()), (local.name(), local.len()));
        assert!(fetched.len() > 1, "{name}");
        for i in 0..local.len() {
            assert_eq!(fetched.request(i), local.request(i), "{name}, document {i}");
            assert_eq!(fetched.target(i), local.target(i), "{name}, document {i}");
        }
    }
}

#[test]
fn a_group_s_members_are_configurations() {
    let place = Place::new(harness_datasets());
    let load = |name: &str| -> Result<TaskSet, Error> { load_tasks(name, &place.data(), place.options()) };
    let task = &load("mmlu_virology").unwrap().tasks[0];
    let files = &task.settings()["files"];
    assert_eq!((&files[0]["config"], &files[0]["split"]), (&json!("virology"), &json!("test")));
    assert_eq!((&files[1]["config"], &files[1]["split"]), (&json!("virology"), &json!("dev")));
    let error = load("mmlu_astronomy").err().unwrap().to_string();
    for part in ["mmlu/astronomy/test.jsonl", "cais/mmlu (configuration astronomy, split test)", "virology/test"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn nothing_is_fetched_unasked_and_the_error_says_how() {
    let folder = tempfile::tempdir().unwrap();
    let error = load_task("piqa", folder.path(), TaskOptions::default()).err().unwrap().to_string();
    assert!(error.contains("piqa/validation.jsonl is missing"), "{error}");
    assert!(error.ends_with("; add --hub to download it from baber/piqa"), "{error}");
}

#[test]
fn shots_that_no_data_set_has_are_not_promised() {
    let place = Place::new(harness_datasets());
    let error = place.load("gsm8k_cot").err().unwrap();
    assert!(matches!(error, Error::LmEvalShots { .. }), "{error}");
    assert!(error.to_string().contains("gsm8k_cot/fewshot.jsonl"), "{error}");
    let options = TaskOptions { num_fewshot: Some(0), ..place.options() };
    assert_eq!(load_task("gsm8k_cot", &place.data(), options).unwrap().len(), 8);
}
