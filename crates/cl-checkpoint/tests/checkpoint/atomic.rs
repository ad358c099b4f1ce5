//! Outputs appear completely or not at all, and what existed before is kept until then.

use std::fs;
#[cfg(unix)]
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cl_checkpoint::{
    Checkpoint, CheckpointWriter, Dtype, Manifest, ManifestProblem, OutputDir, TensorSource, WriteOptions,
};

use super::{assert_error, names, spec, write_model};

const OVERWRITE: WriteOptions = WriteOptions { max_shard_size: u64::MAX, overwrite: true };

#[test]
fn nothing_is_seen_before_the_end_and_the_manifest_lists_everything() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new/model");
    let writer = CheckpointWriter::create(&dir, &[spec("w", Dtype::U8, &[3])], WriteOptions::default()).unwrap();
    writer.write("w", b"abc").unwrap();
    assert!(!dir.exists());
    writer.put_file("tokenizer.json", b"{}").unwrap();
    writer.finish(Manifest::new("model").with_source("base", folder.path(), "ab".to_owned())).unwrap();
    assert_eq!(names(folder.path()), ["new"]);
    assert_eq!(names(&folder.path().join("new")), ["model"]);
    assert_eq!(names(&dir), ["manifest.json", "model.safetensors", "tokenizer.json"]);
    let manifest = Manifest::read(&dir).unwrap();
    assert_eq!(manifest.files.keys().collect::<Vec<_>>(), ["model.safetensors", "tokenizer.json"]);
    assert_eq!(manifest.sources[0].role, "base");
    // printf '{}' | b3sum
    let hash = blake3::hash(b"{}").to_hex().to_string();
    assert_eq!((manifest.files["tokenizer.json"].bytes, &manifest.files["tokenizer.json"].blake3), (2, &hash));
}

#[test]
fn folders_made_for_an_output_go_with_it_unless_somebody_uses_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("mine")).unwrap();
    drop(OutputDir::create(&folder.path().join("mine/a/b/model"), false).unwrap());
    assert!(names(&folder.path().join("mine")).is_empty());
    let out = OutputDir::create(&folder.path().join("mine/a/b/model"), false).unwrap();
    fs::write(folder.path().join("mine/a/notes"), "n").unwrap();
    drop(out);
    assert_eq!(names(&folder.path().join("mine/a")), ["notes"]);
}

#[test]
fn an_existing_output_is_kept_unless_asked() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    write_model(&dir, false, b"old!").unwrap();
    assert_error("exists", write_model(&dir, false, b"new!"), &[dir.to_str().unwrap(), "already exists"]);
    assert_eq!(Checkpoint::open(&dir).unwrap().bytes("w").unwrap(), b"old!");
    fs::write(dir.join("notes.txt"), "mine").unwrap();
    assert_error("with a file of the user's", write_model(&dir, true, b"new!"), &["`notes.txt`", "not overwritten"]);
    fs::remove_file(dir.join("notes.txt")).unwrap();
    write_model(&dir, true, b"new!").unwrap();
    assert_eq!(Checkpoint::open(&dir).unwrap().bytes("w").unwrap(), b"new!");
    assert_eq!(names(&dir), ["config.json", "manifest.json", "model.safetensors"]);
    assert_eq!(names(folder.path()), ["model"]);
}

#[test]
fn after_any_error_nothing_new_is_there_and_the_old_output_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    write_model(&dir, false, b"old!").unwrap();
    let plan = [spec("v", Dtype::F32, &[1]), spec("w", Dtype::F32, &[1])];
    let create = || CheckpointWriter::create(&dir, &plan, OVERWRITE).unwrap();

    let writer = create();
    writer.write("w", &[0; 4]).unwrap();
    assert_error("never written", writer.finish(Manifest::new("model")), &["model", "`v`", "never written"]);
    let writer = create();
    assert_error("not planned", writer.write("x", &[]), &["model", "`x` was not planned"]);
    assert_error("too short", writer.write("w", &[0; 3]), &["`w`", "planned 4 bytes, got 3"]);
    assert_error("too long", writer.write("w", &[0; 5]), &["`w`", "planned 4 bytes, got 5"]);
    for name in ["", ".", "..", "../x", "/x", "a/b", "a/", "a\\b"] {
        assert_error(name, writer.put_file(name, b"x"), &["model", "is not the name of a file"]);
        assert_error(name, writer.copy_file(&dir.join("config.json"), name), &["is not the name of a file"]);
    }
    assert_error("no such file", writer.copy_file(&dir.join("none"), "x"), &["none", "not found"]);
    drop(writer);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _writer = create();
        panic!("in the middle of writing");
    }));
    assert!(panicked.is_err());

    assert_eq!(names(folder.path()), ["model"]);
    assert_eq!(Manifest::verify(&dir).unwrap(), []);
    assert_eq!(Checkpoint::open(&dir).unwrap().bytes("w").unwrap(), b"old!");
}

#[test]
fn a_plan_that_makes_no_sense_is_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let huge = spec("w", Dtype::U8, &[1 << 60]);
    let many = |n: usize| (0..n).map(|i| spec(&format!("w{i}"), Dtype::U8, &[1 << 60])).collect();
    let rows = [
        ("no tensors", vec![], vec!["no tensors"]),
        ("twice", vec![spec("w", Dtype::U8, &[1]), spec("w", Dtype::U8, &[2])], vec!["`w`", "twice"]),
        ("reserved", vec![spec("__metadata__", Dtype::U8, &[1])], vec!["`__metadata__`", "reserved"]),
        ("shape too large", vec![spec("w", Dtype::F32, &[1 << 40, 1 << 40])], vec!["`w`", "too large"]),
        ("half a byte", vec![spec("w", Dtype::F4, &[3])], vec!["`w`"]),
        ("sum beyond any file", many(4), vec!["`w3`", "too large"]),
        ("sum beyond 64 bits", many(17), vec!["`w3`", "too large"]),
    ];
    for (case, plan, mut parts) in rows {
        let dir = folder.path().join("new/model");
        parts.push("new/model");
        assert_error(case, CheckpointWriter::create(&dir, &plan, WriteOptions::default()), &parts);
        assert!(names(folder.path()).is_empty(), "{case}");
    }
    let root = CheckpointWriter::create("/".as_ref(), &[huge], OVERWRITE);
    assert_error("the root", root, &["/", "not the name of a directory"]);
}

#[test]
fn two_parts_of_a_process_never_write_the_same_output() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let first = OutputDir::create(&dir, true).unwrap();
    fs::write(first.path().join("x"), "first").unwrap();
    assert_error("at the same time", OutputDir::create(&dir, true), &["model", "being written"]);
    assert_error("by another name", OutputDir::create(&dir.join("."), true), &["model", "being written"]);
    first.finish(Manifest::new("t")).unwrap();
    assert_eq!(fs::read_to_string(dir.join("x")).unwrap(), "first");
    drop(OutputDir::create(&dir, true).unwrap());
    OutputDir::create(&dir, true).unwrap().finish(Manifest::new("t")).unwrap();
    assert_eq!(names(&dir), ["manifest.json"]);
}

#[cfg(unix)]
#[test]
fn a_file_or_a_link_in_the_way_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("file"), "a file").unwrap();
    fs::create_dir(path("t")).unwrap();
    fs::write(path("t/mine"), "m").unwrap();
    symlink(path("t"), path("full")).unwrap();
    symlink(path("nowhere"), path("gone")).unwrap();
    for (name, why) in [("file", "is a file"), ("full", "neither"), ("gone", "dangling symbolic link")] {
        assert_error(name, write_model(&path(name), false, b"new!"), &["already exists"]);
        assert_error(name, write_model(&path(name), true, b"new!"), &[why, "not overwritten"]);
    }
    assert_eq!(names(folder.path()), ["file", "full", "gone", "t"]);
    assert_eq!(fs::read_to_string(path("full/mine")).unwrap(), "m");
}

#[cfg(unix)]
#[test]
fn a_link_to_a_model_stays_and_the_model_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (model, link) = (folder.path().join("model"), folder.path().join("latest"));
    write_model(&model, false, b"old!").unwrap();
    symlink(&model, &link).unwrap();
    write_model(&link, true, b"new!").unwrap();
    assert!(link.is_symlink());
    assert_eq!(Checkpoint::open(&model).unwrap().bytes("w").unwrap(), b"new!");
    write_model(&folder.path().join("latest/"), true, b"with").unwrap();
    assert!(link.is_symlink());
    assert_eq!(Checkpoint::open(&model).unwrap().bytes("w").unwrap(), b"with");
}

#[test]
fn verifying_follows_no_link_to_a_directory_and_no_name_outside() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    write_model(&dir, false, b"old!").unwrap();
    #[cfg(unix)]
    {
        symlink(folder.path(), dir.join("loop")).unwrap();
        assert_eq!(Manifest::verify(&dir).unwrap(), [ManifestProblem::Unlisted(dir.join("loop"))]);
        fs::remove_file(dir.join("loop")).unwrap();
    }

    fs::write(folder.path().join("secret"), "s").unwrap();
    let mut manifest = Manifest::read(&dir).unwrap();
    let entry = manifest.files["config.json"].clone();
    manifest.files.insert("../secret".to_owned(), entry);
    fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    assert_eq!(Manifest::verify(&dir).unwrap(), [ManifestProblem::Missing(dir.join("../secret"))]);

    fs::write(dir.join("manifest.json"), "{}").unwrap();
    assert_error("no kind", Manifest::verify(&dir), &["manifest.json", "kind"]);
    fs::remove_file(dir.join("manifest.json")).unwrap();
    assert_error("unfinished", Manifest::read(&dir), &["manifest.json: not found", "incomplete"]);
}
