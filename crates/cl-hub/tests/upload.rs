//! Uploads to a Hub server on this machine.

mod server;

use std::path::Path;

use cl_checkpoint::Interrupt;
use cl_hub::{Content, Hub, HubError, Upload, Uploaded};
use server::{COMMIT, Server};

const WEIGHTS: &[u8] = b"weights that come in parts of ten bytes";

fn server() -> Server {
    let server = Server::new();
    server.state().token = "secret".to_owned();
    server
}

fn files(dir: &Path) -> Vec<Upload> {
    std::fs::write(dir.join("model.safetensors"), WEIGHTS).unwrap();
    vec![
        Upload { name: "README.md".into(), content: Content::Bytes(b"---\nlicense: mit\n---\n# \xc3\xbc".to_vec()) },
        Upload { name: "config.json".into(), content: Content::Bytes(b"{}".to_vec()) },
        Upload { name: "model.safetensors".into(), content: Content::File(dir.join("model.safetensors")) },
    ]
}

fn upload(hub: &Hub, files: &[Upload]) -> Result<Uploaded, HubError> {
    hub.upload("me/model", true, files, "Upload", &Interrupt::default())
}

#[test]
fn whole_and_in_parts() {
    for part_size in [None, Some(10), Some(13), Some(WEIGHTS.len())] {
        let (server, folder) = (server(), tempfile::tempdir().unwrap());
        server.state().part_size = part_size;
        let hub = Hub { token: Some("secret".to_owned()), ..server.hub(folder.path()) };
        let files = files(folder.path());
        let done = upload(&hub, &files).unwrap();
        let first = format!("{}1", &COMMIT[..39]);
        let expected = Uploaded { unchanged: 0, sent: 3, bytes: WEIGHTS.len() as u64, commit: Some(first) };
        assert_eq!(done, expected);
        let state = server.state();
        let repo = &state.repos["me/model"];
        assert!(repo.private);
        assert_eq!(repo.files["model.safetensors"], WEIGHTS);
        assert_eq!(repo.files["README.md"], "---\nlicense: mit\n---\n# ü".as_bytes());
        // The token is sent to the Hub, but never to the storage.
        assert!(state.log.iter().all(|l| l.starts_with("storage") != l.contains("Bearer secret")), "{:?}", state.log);
        let puts = state.log.iter().filter(|l| l.starts_with("storage PUT")).count();
        assert_eq!(puts, part_size.filter(|p| *p < WEIGHTS.len()).map_or(1, |p| WEIGHTS.len().div_ceil(p)));
        drop(state);

        // Uploading the same files again sends and commits nothing; of changed files, only those are committed.
        let none = Uploaded { unchanged: 3, ..Uploaded::default() };
        assert_eq!(upload(&hub, &files).unwrap(), none);
        let mut changed = files.clone();
        changed[1].content = Content::Bytes(b"{\"a\": 1}".to_vec());
        let done = upload(&hub, &changed).unwrap();
        assert_eq!((done.unchanged, done.sent, done.bytes, server.state().repos["me/model"].commits), (2, 1, 0, 2));
    }
}

#[test]
fn an_interrupted_upload_sends_nothing_twice() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let hub = Hub { token: Some("secret".to_owned()), ..server.hub(folder.path()) };
    let files = files(folder.path());
    server.state().refuse_storage = true;
    let error = upload(&hub, &files).unwrap_err().to_string();
    assert!(error.contains("HTTP 503") && error.contains("to resume"), "{error}");
    assert_eq!(server.state().repos["me/model"].commits, 0);
    server.state().refuse_storage = false;
    // The file was stored, but the upload was killed before the commit.
    server.state().stored.insert(server::sha256(WEIGHTS), WEIGHTS.to_vec());
    server.state().log.clear();
    let done = upload(&hub, &files).unwrap();
    assert_eq!((done.sent, done.bytes, server.requests("storage")), (3, 0, 0));
}

#[test]
fn what_is_missing_is_said() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let hub = server.hub(folder.path());
    let files = files(folder.path());
    let message = |hub: Hub| upload(&hub, &files).unwrap_err().to_string();
    assert!(message(hub.clone()).contains("set HF_TOKEN"));
    assert!(message(Hub { offline: true, ..hub.clone() }).contains("HF_HUB_OFFLINE"));
    assert_eq!(server.requests(""), 0);
    let wrong = message(Hub { token: Some("wrong".to_owned()), ..hub });
    assert!(wrong.contains("denied (HTTP 401)") && !wrong.contains("wrong"), "{wrong}");
}

#[test]
fn uploads_to_busy_servers_are_sent_again() {
    // Of a failing server, requests are repeated that have no effect of their own: all before the commit.
    for (status, before) in [("429 Wait", usize::MAX), ("502 Bad", 5)] {
        let mut count = 0;
        loop {
            let (server, folder) = (server(), tempfile::tempdir().unwrap());
            let hub = Hub { token: Some("secret".to_owned()), ..server.hub(folder.path()) };
            let files = files(folder.path());
            server.state().busy_at = Some(count);
            server.state().busy_status = status;
            let done = upload(&hub, &files);
            if server.state().busy_at.is_some() {
                break;
            }
            match done {
                Ok(done) => assert_eq!((done.sent, server.state().repos["me/model"].commits), (3, 1), "{count}"),
                Err(error) => assert!(count >= before && error.to_string().contains("HTTP 502"), "{count}: {error}"),
            }
            count += 1;
        }
        assert_eq!(count, 6, "create, preupload, batch, storage, verify, commit");
    }
}

#[test]
fn a_request_to_stop_ends_the_wait_for_the_hub() {
    let (server, folder) = (server(), tempfile::tempdir().unwrap());
    let hub = Hub { token: Some("secret".to_owned()), ..server.hub(folder.path()) };
    let files = files(folder.path());
    server.stay_busy("429 Wait");
    let interrupt = Interrupt::default();
    std::thread::scope(|scope| {
        scope.spawn(|| server.stop_at_first_request(&interrupt));
        let error = hub.upload("me/model", true, &files, "Upload", &interrupt).unwrap_err().to_string();
        assert!(error.contains("stopped; the same command resumes it"), "{error}");
    });
    assert_eq!(server.requests(""), 1, "no request after the stop");
}
