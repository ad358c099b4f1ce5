//! The adapter commands, tested through the functions that the binary calls, and in a process that is killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cl_checkpoint::Manifest;
use serde_json::Value;

use super::{fixture, lora, write};
use crate::command::{call, path};

#[test]
fn combine_info_and_diff() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, other, out) = (fixture("plain"), fixture("other"), folder.path().join("out"));
    let inputs = [path(&plain), path(&other)];
    let told =
        call(&["adapter", "combine", inputs[0], inputs[1], "--weights", "1,-0.5", "--rank", "2", "--out", path(&out)]);
    let told = told.unwrap();
    assert!(
        told.contains("2 adapters combined by linear, 7 modules, maximum rank 2") && told.lines().count() == 10,
        "{told}"
    );
    let again = ["adapter", "combine", inputs[0], inputs[1], "--out", path(&out)];
    assert!(call(&again).unwrap_err().contains("exists"));
    let more = [
        "--overwrite",
        "--json",
        "--method",
        "dare-ties",
        "--density",
        "0.5",
        "--sign",
        "frequency",
        "--set",
        "rescale=norm",
    ];
    let json: Value = serde_json::from_str(&call(&[&again[..], &more].concat()).unwrap()).unwrap();
    assert_eq!((&json["method"], json["modules"].as_array().unwrap().len()), (&Value::from("dare_ties"), 7));
    let manifest = Manifest::read(&out).unwrap().config.unwrap();
    let parameters = &manifest["combine"]["parameters"];
    assert_eq!((&parameters["election"], &parameters["rescale"]), (&Value::from("count"), &Value::from("norm")));
    for (wrong, part) in [
        ("rescale", "expected KEY=VALUE"),
        ("epsilon=0.1", "no parameter `epsilon`"),
        ("density=[0.1,0.2]", "a single value"),
    ] {
        let told = call(&[&again[..], &["--overwrite", "--method", "ties", "--set", wrong]].concat()).unwrap_err();
        assert!(told.contains(part), "{told}");
    }
    let told = call(&["adapter", "info", inputs[0]]).unwrap();
    for part in ["LORA", "rank        2, alpha 6", "in F32", "effective rank", "model.layers.0.mlp.up_proj", "12x8"] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    assert!(call(&["adapter", "info", path(&out)]).unwrap().contains("source      adapter"));
    let told = call(&["adapter", "diff", inputs[0], path(&fixture("rslora"))]).unwrap();
    assert!(told.contains("overlap A") && told.contains("only in the first: model.layers.0.mlp.up_proj"), "{told}");
    for command in ["info", "diff"] {
        let both = ["adapter", command, inputs[0], inputs[1], "--json"];
        let arguments = if command == "diff" { both.to_vec() } else { vec![both[0], both[1], both[2], both[4]] };
        let json: Value = serde_json::from_str(&call(&arguments).unwrap()).unwrap();
        assert_eq!(json["modules"].as_array().unwrap().len(), 7);
    }
}

#[test]
fn fold_and_extract() {
    let folder = tempfile::tempdir().unwrap();
    let (base, model, back) = (fixture("untied"), folder.path().join("model"), folder.path().join("back"));
    let (plain, other) = (fixture("plain"), fixture("other"));
    let fold = [
        "adapter",
        "fold",
        path(&base),
        path(&plain),
        path(&other),
        "--out",
        path(&model),
        "--drift",
        "--threads",
        "2",
    ];
    let told = call(&fold).unwrap();
    assert!(told.contains("7 tensors folded, 5 copied unchanged") && told.contains("entries that differ"), "{told}");
    let json: Value = serde_json::from_str(&call(&[&fold[..], &["--overwrite", "--json"]].concat()).unwrap()).unwrap();
    assert_eq!((json["folded"].as_u64(), json["drift"]["modules"].as_array().map(Vec::len)), (Some(7), Some(7)));
    assert!(call(&["verify", path(&model)]).is_ok());
    let sources = Manifest::read(&model).unwrap().sources;
    let roles: Vec<&str> = sources.iter().map(|source| source.role.as_str()).collect();
    assert_eq!(roles, ["base", "adapter", "adapter"]);
    let extract = [
        "adapter",
        "extract",
        path(&base),
        path(&model),
        "--rank",
        "4",
        "--out",
        path(&back),
        "--targets",
        "q_proj,up_proj",
    ];
    let told = call(&extract).unwrap();
    assert!(told.contains("2 modules, maximum rank 4") && told.contains("5 differing tensors left out"), "{told}");
    assert!(call(&extract).unwrap_err().contains("exists"));
    // The manifest of an extracted adapter names its base.
    assert!(call(&["adapter", "fold", path(&base), path(&back), "--out", path(&folder.path().join("again"))]).is_ok());
    let wrong = call(&["adapter", "fold", path(&model), path(&back), "--out", path(&folder.path().join("no"))]);
    assert!(wrong.unwrap_err().contains("a different base"));
}

/// The process to kill is this test binary, started again.
const CHILD: &str = "CL_ADAPTER_TEST_CHILD";

fn dirs(folder: &Path) -> Vec<PathBuf> {
    (0..4).map(|i| folder.join(format!("a{i}"))).collect()
}

fn combine_in_child(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "adapter::command::a_killed_command_leaves_nothing_that_looks_finished", "--nocapture"])
        .env(CHILD, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn combine_here(folder: &Path) {
    let (dirs, out) = (dirs(folder), folder.join("out"));
    let inputs: Vec<&str> = dirs.iter().map(|dir| path(dir)).collect();
    let rest = ["--method", "ties", "--density", "0.5", "--overwrite", "--out", path(&out)];
    call(&[&["adapter", "combine"], &inputs[..], &rest].concat()).unwrap();
}

#[test]
fn a_killed_command_leaves_nothing_that_looks_finished() {
    if let Ok(folder) = std::env::var(CHILD) {
        return combine_here(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let modules: Vec<String> = (0..12).map(|i| format!("m.{i}.q")).collect();
    let modules: Vec<(&str, usize, usize)> = modules.iter().map(|name| (name.as_str(), 120, 100)).collect();
    dirs(folder).iter().enumerate().for_each(|(i, dir)| write(dir, &lora(4, 4.0), &modules, i as u64));
    let started = std::time::Instant::now();
    assert!(combine_in_child(folder).wait().unwrap().success());
    let whole = started.elapsed();
    std::fs::remove_dir_all(folder.join("out")).unwrap();
    let mut killed = 0;
    for i in 0..8 {
        let mut child = combine_in_child(folder);
        std::thread::sleep(whole.mul_f64(0.2 + 0.1 * f64::from(i)));
        let _ = child.kill();
        child.wait().unwrap();
        if folder.join("out").exists() {
            assert!(Manifest::verify(&folder.join("out")).unwrap().is_empty(), "kill {i}: an output that is not whole");
            std::fs::remove_dir_all(folder.join("out")).unwrap();
        } else {
            killed += 1;
        }
    }
    assert!(killed > 0, "no kill came in time");
    combine_here(folder);
    let left = std::fs::read_dir(folder).unwrap().count();
    assert_eq!(left, 5, "four adapters and the output");
}

#[test]
fn the_paper_combines_factors_at_density_a_fifth() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = ["plain", "third"].map(fixture);
    let run = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let rest = ["--out", path(&out)];
        call(&[&["adapter", "combine", path(&adapters[0]), path(&adapters[1])], more, &rest].concat()).unwrap();
        std::fs::read(out.join("adapter_model.safetensors")).unwrap()
    };
    let paper = run("paper", &["--method", "ties", "--profile", "paper"]);
    let spelt = run("spelt", &["--method", "ties", "--space", "factors", "--density", "0.2"]);
    assert!(paper == spelt);
    let delta = run("delta", &["--method", "ties", "--profile", "paper", "--space", "delta"]);
    assert!(paper != delta, "what is set wins");
}
