//! Tasks whose rows are fetched from a hub on this machine.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cl_data::Hub;
use cl_eval::{Request, TaskOptions, load_task, load_tasks};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves the files of data sets by repository; counts requests.
fn serve(datasets: &'static [(&'static str, &'static [(&'static str, &'static str)])]) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            counter.fetch_add(1, Ordering::SeqCst);
            answer(stream, datasets);
        }
    });
    (address, count)
}

fn answer(mut stream: TcpStream, datasets: &[(&str, &[(&str, &str)])]) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut line) = (String::new(), String::new());
    reader.read_line(&mut first).unwrap();
    while reader.read_line(&mut line).unwrap_or(0) > 0 && line != "\r\n" {
        line.clear();
    }
    let words: Vec<&str> = first.split(' ').collect();
    let (head, path) = (words[0] == "HEAD", words[1]);
    let found = datasets.iter().find_map(|(repo, files)| {
        if path.starts_with(&format!("/api/datasets/{repo}/revision/")) {
            let siblings: Vec<_> = files.iter().map(|(p, _)| serde_json::json!({ "rfilename": p })).collect();
            return Some(serde_json::json!({ "id": repo, "sha": COMMIT, "siblings": siblings }).to_string());
        }
        let own = path.strip_prefix(&format!("/datasets/{repo}/resolve/"))?;
        let file = own.split_once('/')?.1;
        files.iter().find(|(p, _)| *p == file).map(|(_, text)| (*text).to_owned())
    });
    let (status, body) = found.map_or(("404 No", String::new()), |b| ("200 OK", b));
    let etag =
        std::hash::BuildHasher::hash_one(&std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default(), &body);
    let headers = format!("ETag: \"{etag:040x}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {}\r\n", body.len());
    let body = if head { "" } else { body.as_str() };
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n{body}").unwrap();
}

fn hub(endpoint: &str, cache: &Path) -> Hub {
    Hub { endpoint: endpoint.to_owned(), cache: cache.to_owned(), token: None, offline: false }
}

const ARC: &str = r#"{"id": "1", "question": "What is wet?", "choices": {"text": ["sand", "rain"], "label": ["A", "B"]}, "answerKey": "B"}
"#;
const SHOT: &str = r#"{"id": "2", "question": "What is dry?", "choices": {"text": ["sand", "rain"], "label": ["A", "B"]}, "answerKey": "A"}
"#;
const MMLU: &str = r#"{"question": "1 + 1?", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 1}
"#;

const DATASETS: &[(&str, &[(&str, &str)])] = &[
    ("allenai/ai2_arc", &[("ARC-Challenge/test.jsonl", ARC), ("ARC-Challenge/train.jsonl", SHOT)]),
    ("cais/mmlu", &[("anatomy/test.jsonl", MMLU), ("anatomy/dev.jsonl", MMLU)]),
];

#[test]
fn rows_come_from_the_hub_once_and_then_from_its_cache() {
    let folder = tempfile::tempdir().unwrap();
    let (data, cache) = (folder.path().join("data"), folder.path().join("cache"));
    std::fs::create_dir(&data).unwrap();
    let (endpoint, requests) = serve(DATASETS);
    let mut hub = hub(&endpoint, &cache);
    let load = |hub: &Hub| {
        let options = TaskOptions { num_fewshot: Some(1), hub: Some(hub), ..TaskOptions::default() };
        load_task("arc_challenge", &data, options)
    };
    let task = load(&hub).unwrap();
    let Request::Loglikelihood(asked) = task.request(0) else { panic!("asks for texts") };
    assert_eq!(asked[1].context, "Question: What is dry?\nAnswer: sand\n\nQuestion: What is wet?\nAnswer:");
    assert_eq!(asked[1].continuation, " rain");
    let files = &task.settings()["files"];
    assert_eq!((&files[0]["repo"], &files[0]["config"]), (&"allenai/ai2_arc".into(), &"ARC-Challenge".into()));
    assert_eq!((&files[1]["split"], files[1]["blake3"].as_str().unwrap().len()), (&"train".into(), 64));

    // Offline nothing is asked for, and the same rows are there.
    let before = requests.load(Ordering::SeqCst);
    hub.offline = true;
    assert_eq!(load(&hub).unwrap().request(0), task.request(0));
    assert_eq!(requests.load(Ordering::SeqCst), before);
    hub.cache = folder.path().join("empty");
    let error = load(&hub).err().unwrap().to_string();
    assert!(error.contains("allenai/ai2_arc") && error.contains("HF_HUB_OFFLINE"), "{error}");

    // A local file wins.
    std::fs::create_dir(data.join("arc_challenge")).unwrap();
    std::fs::write(data.join("arc_challenge/test.jsonl"), ARC.replace("rain", "snow")).unwrap();
    std::fs::write(data.join("arc_challenge/fewshot.jsonl"), SHOT).unwrap();
    let Request::Loglikelihood(asked) = load(&hub).unwrap().request(0) else { panic!("asks for texts") };
    assert_eq!(asked[1].continuation, " snow");
}

#[test]
fn a_group_s_members_are_configurations() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _) = serve(DATASETS);
    let hub = hub(&endpoint, &folder.path().join("cache"));
    let options = TaskOptions { num_fewshot: Some(1), hub: Some(&hub), ..TaskOptions::default() };
    let set = load_tasks("mmlu_anatomy", folder.path(), options).unwrap();
    assert_eq!((set.tasks[0].name(), set.tasks[0].len()), ("mmlu_anatomy", 1));
    let error = load_tasks("mmlu_astronomy", folder.path(), options).err().unwrap().to_string();
    assert!(error.contains("cais/mmlu") && error.contains("astronomy") && error.contains("anatomy"), "{error}");
}

#[test]
fn nothing_is_fetched_unasked_and_the_error_says_how() {
    let folder = tempfile::tempdir().unwrap();
    let error = load_task("piqa", folder.path(), TaskOptions::default()).err().unwrap().to_string();
    assert!(error.contains("piqa/validation.jsonl is missing"), "{error}");
    assert!(error.contains("fetched from the hub's data set baber/piqa with --hub"), "{error}");
}
