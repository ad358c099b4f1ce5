//! A merge that is killed leaves nothing that looks complete, and the next merge cleans up.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cl_checkpoint::Manifest;

use super::models::Llama;

/// The command needs the feature `cli`. To test the library alone, this test binary runs itself as the process to kill.
const CHILD: &str = "CL_MERGE_TEST_CHILD";

fn merge_in_child(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "atomic::a_killed_merge_leaves_nothing_that_looks_finished", "--nocapture"])
        .env(CHILD, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn merge_here(folder: &Path) {
    let text = format!(
        "base_model = {:?}\n[method.della]\ndensity = 0.5\nrescale = \"norm\"\n[[models]]\nmodel = {:?}\n[[models]]\nmodel = {:?}\n",
        folder.join("base"),
        folder.join("ft1"),
        folder.join("ft2")
    );
    let file = cl_merge::MergeFile::from_toml(&text).unwrap();
    let options = cl_merge::MergeOptions { overwrite: true, ..Default::default() };
    cl_merge::run_file(&file, &folder.join("out"), &options, &|_| ()).unwrap();
}

fn writing(folder: &Path) -> bool {
    let names = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.into_iter().any(|name| name.starts_with(".out.") && name.ends_with(".part"))
}

#[test]
fn a_killed_merge_leaves_nothing_that_looks_finished() {
    if let Ok(folder) = std::env::var(CHILD) {
        return merge_here(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    Llama { vocab: 2000, hidden: 128, ..Llama::default() }.family(folder, 2);
    let (mut killed, mut finished) = (0, 0);
    // The process is killed at times spread over the duration of a merge, which is measured because machines differ.
    let started = std::time::Instant::now();
    assert!(merge_in_child(folder).wait().unwrap().success());
    let whole = started.elapsed();
    fs::remove_dir_all(folder.join("out")).unwrap();
    for i in 0..20 {
        let mut child = merge_in_child(folder);
        // The time is counted from the first write, which takes longer on a busy machine.
        while !writing(folder) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(whole.mul_f64(0.02 * f64::from(i)));
        let _ = child.kill();
        child.wait().unwrap();
        let out = folder.join("out");
        if out.exists() {
            finished += 1;
            assert!(Manifest::verify(&out).unwrap().is_empty(), "kill {i}: an output that is not whole");
            fs::remove_dir_all(&out).unwrap();
        } else {
            killed += 1;
        }
    }
    println!("{killed} killed before the end, {finished} finished");
    assert!(killed > 0, "no kill came in time");
    // The next merge removes the remains of the killed ones.
    merge_here(folder);
    let mut left: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["base", "ft1", "ft2", "out"]);
}
