//! Signals to the running binary, and the memory that it returns.

#![cfg(feature = "cli")]

use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::models::Llama;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Waits until the process has begun to write, which is long before it can finish.
fn wait_for_output(child: &mut Child, folder: &Path, before: &[String]) {
    while names(folder).len() == before.len() {
        assert!(child.try_wait().unwrap().is_none(), "ended before it wrote");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn a_signal_ends_a_merge_in_one_line_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // Decomposing matrices of this width takes seconds.
    let (base, tuned) = Llama { hidden: 512, layers: 3, ..Llama::default() }.family(folder.path(), 2);
    let config = folder.path().join("merge.toml");
    let models: String = tuned.iter().map(|m| format!("[[models]]\nmodel = {m:?}\n")).collect();
    std::fs::write(&config, format!("base_model = {base:?}\nmethod = \"tsv\"\n{models}")).unwrap();
    let before = names(folder.path());
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cl-merge"))
            .args(["run", config.to_str().unwrap(), "--threads", "1", "--out", "out"])
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for_output(&mut child, folder.path(), &before);
        let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), told.lines().count()), (Some(code), 1), "{signal}: {told}");
        assert!(told.starts_with("error: stopped; nothing was written"), "{told}");
        assert_eq!(names(folder.path()), before, "{signal}");
    }
}

/// The allocator reads its setting when a program starts, so it must be in the environment of the process that merges.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_is_freed_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let (base, tuned) = Llama { hidden: 512, layers: 3, ..Llama::default() }.family(folder.path(), 2);
    let config = folder.path().join("merge.toml");
    let models: String = tuned.iter().map(|m| format!("[[models]]\nmodel = {m:?}\n")).collect();
    std::fs::write(&config, format!("base_model = {base:?}\nmethod = \"tsv\"\n{models}")).unwrap();
    let before = names(folder.path());
    for (own, expected) in [(None, "4194304"), (Some("65536"), "65536")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cl-merge"));
        command.args(["run", "merge.toml", "--threads", "1", "--out", "out"]).current_dir(folder.path());
        command.env_remove("MALLOC_MMAP_THRESHOLD_").env_remove("GLIBC_TUNABLES");
        own.map(|value| command.env("MALLOC_MMAP_THRESHOLD_", value));
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        wait_for_output(&mut child, folder.path(), &before);
        let environment = std::fs::read(format!("/proc/{}/environ", child.id())).unwrap();
        let _ = child.kill();
        child.wait().unwrap();
        let set = format!("MALLOC_MMAP_THRESHOLD_={expected}");
        assert!(environment.split(|b| *b == 0).any(|variable| variable == set.as_bytes()));
        names(folder.path()).iter().filter(|n| n.starts_with(".out")).for_each(|name| {
            let path = folder.path().join(name);
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        });
    }
}
