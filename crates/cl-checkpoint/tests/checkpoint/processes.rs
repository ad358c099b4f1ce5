//! Several processes and one output. Each process is this test binary, which gets its task from environment variables.
//! Where the kernel allows it, processes run in separate pid namespaces and so have the same pid, as in containers.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cl_checkpoint::{Error, Manifest, OutputDir};

use super::names;

const TARGET: &str = "CL_TEST_TARGET";
const CONTENT: &str = "CL_TEST_CONTENT";
const BUSY: i32 = 3;

/// The body of a process: creates the output, signals that it has begun, and finishes when a file `go` appears.
#[test]
fn writer() {
    let (Ok(target), Ok(content)) = (std::env::var(TARGET), std::env::var(CONTENT)) else { return };
    let target = Path::new(&target);
    let out = match OutputDir::create(target, true) {
        Err(Error::Busy { .. }) => std::process::exit(BUSY),
        other => other.unwrap(),
    };
    fs::write(out.path().join("content"), content).unwrap();
    wait_for(&target.with_file_name("go"));
    out.finish(Manifest::new("test")).unwrap();
}

/// Starts a process, in its own pid namespace if `isolated`.
fn spawn(target: &Path, content: &str, isolated: bool) -> Child {
    let test = std::env::current_exe().unwrap();
    let mut command = if isolated {
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--kill-child"]).arg(test);
        unshare
    } else {
        Command::new(test)
    };
    command.args(["--exact", "processes::writer"]).env(TARGET, target).env(CONTENT, content);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until a process has written to its temporary directory.
fn wait_until_begun(folder: &Path) {
    let start = Instant::now();
    let begun = || names(folder).iter().any(|n| n.ends_with(".part") && folder.join(n).join("content").exists());
    while !begun() {
        assert!(start.elapsed() < Duration::from_secs(60), "no writer begins");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn one_wins(isolated: bool) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let mut first = spawn(&target, "first", isolated);
    wait_until_begun(folder.path());
    assert_eq!(spawn(&target, "second", isolated).wait().unwrap().code(), Some(BUSY));
    fs::write(folder.path().join("go"), "").unwrap();
    assert!(first.wait().unwrap().success());
    assert_eq!(fs::read_to_string(target.join("content")).unwrap(), "first");
    assert_eq!(names(folder.path()), ["go", "out"]);
}

#[test]
fn of_two_processes_one_writes_and_the_other_is_refused() {
    one_wins(false);
}

#[test]
fn the_same_with_equal_pids_in_two_namespaces() {
    let allowed = Command::new("unshare").args(["--pid", "--fork", "true"]).stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|s| s.success()) {
        eprintln!("left out: pid namespaces need a privilege that this user does not have");
        return;
    }
    one_wins(true);
}

#[test]
fn what_a_killed_process_left_is_removed_by_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let mut first = spawn(&target, "first", false);
    wait_until_begun(folder.path());
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(names(folder.path()).len(), 2, "a temporary and a lock are left");
    fs::write(folder.path().join("go"), "").unwrap();
    assert!(spawn(&target, "second", false).wait().unwrap().success());
    assert_eq!(fs::read_to_string(target.join("content")).unwrap(), "second");
    assert_eq!(names(folder.path()), ["go", "out"]);
}
