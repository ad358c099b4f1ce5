//! Models and adapters downloaded from a Hub server on this machine.

mod server;

use std::path::Path;

use cl_checkpoint::Interrupt;
use cl_hub::{Hub, HubError, Names, Part, Repo};
use server::{COMMIT, Server, git_sha1, sha256};

/// A repository that, like real ones, contains more than a model needs.
fn full() -> Server {
    let server = Server::new();
    for (path, bytes) in [
        ("README.md", "---\nlicense: mit\n---\n"),
        (".gitattributes", "*.safetensors filter=lfs"),
        ("config.json", "{\"model_type\": \"llama\"}"),
        ("generation_config.json", "{}"),
        ("tokenizer.json", "{\"version\": \"1.0\"}"),
        ("model.safetensors", "the weights, many of them"),
        ("pytorch_model.bin", "the same weights"),
        ("model-Q4_K_M.gguf", "and again"),
        ("onnx/model.onnx", "and again"),
        ("onnx/config.json", "{}"),
        ("consolidated.safetensors", "and again"),
    ] {
        server.add("o/m", path, bytes.as_bytes());
    }
    server
}

fn repo(written: &str) -> Repo {
    Repo::parse_model(written).unwrap()
}

fn model(hub: &Hub, written: &str) -> Result<cl_hub::Snapshot, HubError> {
    hub.model(&repo(written), Part::Model, &Interrupt::default())
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn only_what_a_model_needs_in_the_layout_of_the_cache() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let plan = hub.plan_model(&repo("o/m"), Part::Model).unwrap();
    let needed = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    let bytes: usize = needed.iter().map(|name| server.state().repos["o/m"].files[*name].len()).sum();
    assert_eq!((plan.files, plan.bytes, plan.commit.as_str()), (5, bytes as u64, COMMIT));
    assert!(!plan.dir.exists(), "a plan downloads nothing");

    let snapshot = model(&hub, "o/m").unwrap();
    let folder = cache.path().join("models--o--m");
    assert_eq!(snapshot.dir, folder.join("snapshots").join(COMMIT));
    assert_eq!(names(&snapshot.dir), needed);
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let blob = |name: &str, hash: String| {
        let link = std::fs::read_link(snapshot.dir.join(name)).unwrap();
        assert_eq!(link, Path::new("../../blobs").join(hash));
    };
    blob("model.safetensors", sha256(b"the weights, many of them"));
    blob("generation_config.json", git_sha1(b"{}"));

    server.state().log.clear();
    assert_eq!(model(&hub, "o/m").unwrap(), snapshot);
    assert_eq!(server.requests(""), 1, "no file is asked for again");
    assert_eq!(server.requests("GET /api/models/o/m/"), 1);
    assert_eq!(hub.plan_model(&repo("o/m"), Part::Model).unwrap().files, 0);
}

#[test]
fn shards_are_those_of_the_index() {
    let (server, cache) = (Server::new(), tempfile::tempdir().unwrap());
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    for (path, bytes) in [
        ("config.json", "{}"),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00002.safetensors", "one"),
        ("model-00002-of-00002.safetensors", "two"),
        ("model-00001-of-00003.safetensors", "of an older version"),
    ] {
        server.add("o/m", path, bytes.as_bytes());
    }
    let snapshot = model(&server.hub(cache.path()), "o/m").unwrap();
    assert_eq!(
        names(&snapshot.dir),
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json"
        ]
    );
    server.add("o/out", "config.json", b"{}");
    server.add("o/out", "model.safetensors.index.json", br#"{"weight_map": {"a": "../../x"}}"#);
    let error = model(&server.hub(cache.path()), "o/out").unwrap_err().to_string();
    assert!(error.contains("lists `../../x`"), "{error}");
}

#[test]
fn revisions_are_pinned_to_their_commit() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    server.state().repos.get_mut("o/m").unwrap().revisions.push("v1".to_owned());
    let hub = server.hub(cache.path());
    assert_eq!(model(&hub, "o/m@v1").unwrap().commit, COMMIT);
    assert_eq!(model(&hub, &format!("o/m@{COMMIT}")).unwrap().commit, COMMIT);
    let error = model(&hub, "o/m@v2").unwrap_err().to_string();
    assert!(error.contains("no model o/m at revision v2") && error.contains("not the revision"), "{error}");
    let error = model(&hub, "o/none").unwrap_err().to_string();
    assert!(error.contains("no model o/none at revision main"), "{error}");
}

#[test]
fn wrong_bytes_are_noticed_in_large_and_small_files() {
    for (name, hash) in [("model.safetensors", "SHA-256"), ("config.json", "SHA-1")] {
        let (server, cache) = (full(), tempfile::tempdir().unwrap());
        let hub = server.hub(cache.path());
        // All other files are already cached.
        model(&hub, "o/m").unwrap();
        let link = cache.path().join("models--o--m/snapshots").join(COMMIT).join(name);
        std::fs::remove_file(std::fs::canonicalize(&link).unwrap()).unwrap();
        server.state().wrong_bytes = true;
        let error = model(&hub, "o/m").unwrap_err();
        assert!(matches!(error, HubError::Download { .. }) && error.to_string().contains(hash), "{error}");
        assert!(!link.exists());
        server.state().wrong_bytes = false;
        model(&hub, "o/m").unwrap();
    }
}

#[test]
fn what_a_killed_process_left_is_continued() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let weights = b"the weights, many of them";
    let blobs = cache.path().join("models--o--m/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.cl.incomplete", sha256(weights))), &weights[..10]).unwrap();
    let snapshot = model(&server.hub(cache.path()), "o/m").unwrap();
    assert_eq!(std::fs::read(snapshot.dir.join("model.safetensors")).unwrap(), weights);
    assert!(server.state().log.iter().any(|line| line.starts_with("storage GET") && line.ends_with("bytes=10-")));
    assert!(names(&blobs).iter().all(|name| !name.contains("incomplete")));
}

#[test]
fn a_request_to_stop_keeps_what_arrived() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let interrupt = Interrupt::default();
    interrupt.request();
    let hub = server.hub(cache.path());
    let error = hub.model(&repo("o/m"), Part::Model, &interrupt).unwrap_err();
    assert!(matches!(error, HubError::Interrupted { .. }), "{error}");
    model(&hub, "o/m").unwrap();
}

#[test]
fn several_at_once_download_each_file_once() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let snapshot = model(&hub, "o/m").unwrap();
                assert!(std::fs::read(snapshot.dir.join("model.safetensors")).is_ok());
            });
        }
    });
    assert_eq!(server.requests("storage GET"), 1);
    assert_eq!(
        server.state().log.iter().filter(|l| l.starts_with("GET /o/m/resolve/") && l.contains("config.json")).count(),
        2
    );
}

#[test]
fn offline_says_what_is_missing() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let online = server.hub(cache.path());
    let offline = Hub { offline: true, ..online.clone() };
    let message = |result: Result<_, HubError>| result.map(|_: cl_hub::Snapshot| ()).unwrap_err().to_string();
    let error = message(model(&offline, "o/m"));
    assert!(error.contains("o/m at revision main: the model is not in") && error.contains("unset it"), "{error}");
    let snapshot = model(&online, "o/m").unwrap();
    server.state().log.clear();
    assert_eq!(model(&offline, "o/m").unwrap(), snapshot);
    assert_eq!(model(&offline, &format!("o/m@{COMMIT}")).unwrap(), snapshot);
    assert_eq!(server.state().log.len(), 0);
    std::fs::remove_file(snapshot.dir.join("tokenizer.json")).unwrap();
    let error = message(model(&offline, "o/m"));
    assert!(error.contains("tokenizer.json is not in"), "{error}");
    // The cache as another client leaves it, without a list of the commit's files.
    std::fs::remove_dir_all(cache.path().join("models--o--m/.listing")).unwrap();
    assert_eq!(model(&offline, "o/m").unwrap(), snapshot);
    std::fs::remove_file(snapshot.dir.join("model.safetensors")).unwrap();
    let error = message(model(&offline, "o/m"));
    assert!(error.contains("model.safetensors is not in"), "{error}");
}

#[test]
fn adapters_and_repositories_that_are_something_else() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    for (path, bytes) in [("adapter_config.json", "{}"), ("adapter_model.safetensors", "A and B"), ("x.bin", "")] {
        server.add("o/a", path, bytes.as_bytes());
    }
    for (repo, path) in [("o/bin", "pytorch_model.bin"), ("o/gguf", "m.gguf"), ("o/bin", "config.json"), ("o/no", "x")]
    {
        server.add(repo, path, b"{}");
    }
    let hub = server.hub(cache.path());
    let of = |written: &str, part| hub.model(&repo(written), part, &Interrupt::default());
    assert_eq!(names(&of("o/a", Part::Adapter).unwrap().dir), ["adapter_config.json", "adapter_model.safetensors"]);
    for (written, part, expected) in [
        ("o/a", Part::Model, "is an adapter"),
        ("o/m", Part::Adapter, "is a model"),
        ("o/bin", Part::Model, "only .bin weights"),
        ("o/gguf", Part::Model, "only GGUF"),
        ("o/no", Part::Model, "no config.json"),
        ("o/no", Part::Adapter, "no adapter_config.json"),
    ] {
        let error = of(written, part).unwrap_err();
        assert!(matches!(error, HubError::Unusable { .. }) && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let hub = Hub { token: Some("secret".to_owned()), ..server.hub(cache.path()) };
    model(&hub, "o/m").unwrap();
    let state = server.state();
    let (to_storage, to_hub): (Vec<_>, Vec<_>) = state.log.iter().partition(|line| line.starts_with("storage"));
    assert!(!to_storage.is_empty() && to_storage.iter().all(|line| !line.contains("secret")), "{to_storage:?}");
    assert!(to_hub.iter().all(|line| line.contains("Bearer secret")), "{to_hub:?}");
}

#[test]
fn a_directory_of_that_name_is_used_first() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let names = Names { hub: Some(server.hub(cache.path())), interrupt: Interrupt::default() };
    let located = names.locate("o/m", Part::Model).unwrap();
    assert_eq!((located.commit.as_deref(), located.dir.is_dir()), (Some(COMMIT), true));
    // A path that exists below the working directory and looks like a name on the Hub.
    let located = names.locate("tests/server", Part::Model).unwrap();
    assert_eq!((located.commit, located.dir.as_path()), (None, Path::new("tests/server")));
    let alone = Names { hub: None, ..names };
    let located = alone.locate("o/m", Part::Model).unwrap();
    let error = cl_checkpoint::Checkpoint::open(&located.dir).err().unwrap().to_string();
    assert_eq!(error, "o/m: not found; add --hub to download a model of the Hugging Face hub by this name");
}

#[test]
fn busy_servers_are_asked_again() {
    for status in ["429 Wait", "500 No", "503 Busy"] {
        let mut count = 0;
        loop {
            let (server, cache) = (full(), tempfile::tempdir().unwrap());
            (server.state().busy_at, server.state().busy_status) = (Some(count), status);
            let (hub, repo) = (server.hub(cache.path()), repo("o/m"));
            let revision = hub.revision(&repo).unwrap();
            let paths = revision.fetch(&["model.safetensors".to_owned()], &Interrupt::default()).unwrap();
            assert!(paths[0].is_file());
            if server.state().busy_at.is_some() {
                break;
            }
            count += 1;
        }
        assert_eq!(count, 4, "{status}: listing, headers, redirect, content");
    }
}

#[test]
fn a_server_that_stays_busy_is_an_error() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    let after = |status: &'static str, seconds: u64, hub: &Hub| {
        let mut state = server.state();
        (state.busy, state.busy_status, state.retry_after) = (usize::MAX, status, seconds);
        state.log.clear();
        drop(state);
        let error = model(hub, "o/m").unwrap_err().to_string();
        (error, server.requests(""))
    };
    let (error, requests) = after("429 Wait", 0, &hub);
    assert!(error.contains("/api/models/o/m") && error.contains("rate limited; wait, or set HF_TOKEN"), "{error}");
    assert!((4..10).contains(&requests), "{requests}");
    // A pause that is too long is not waited for.
    let (error, requests) = after("429 Wait", 300, &hub);
    assert!(error.contains("rate limited for 300 s; wait, or set HF_TOKEN"), "{error}");
    assert_eq!(requests, 1);
    let (error, _) = after("429 Wait", 0, &Hub { token: Some("t".to_owned()), ..hub.clone() });
    assert!(error.ends_with("rate limited; wait and try again"), "{error}");
    let (error, requests) = after("503 Busy", 0, &hub);
    assert!(error.contains("HTTP 503") && error.contains("try again later") && requests > 3, "{error} {requests}");
    // A missing repository is not asked for again.
    server.state().busy = 0;
    server.state().log.clear();
    model(&hub, "o/none").unwrap_err();
    assert_eq!(server.requests(""), 1);
}

#[test]
fn a_request_to_stop_ends_the_wait() {
    let (server, cache) = (full(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    server.stay_busy("503 Busy");
    let interrupt = Interrupt::default();
    std::thread::scope(|scope| {
        scope.spawn(|| server.stop_at_first_request(&interrupt));
        let error = hub.model(&repo("o/m"), Part::Model, &interrupt).unwrap_err();
        assert!(matches!(error, HubError::Interrupted { .. }), "{error}");
    });
    assert_eq!(server.requests(""), 1, "no request after the stop");
}
