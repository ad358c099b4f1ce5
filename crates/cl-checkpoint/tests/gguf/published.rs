//! A published GGUF file compared with its published model; skipped unless environment variables name both.

use std::io::Write;
use std::path::PathBuf;

use cl_checkpoint::gguf::{FloatDtype, import};
use cl_checkpoint::{Checkpoint, TensorSource};
use tokenizers::Tokenizer;

use super::{fixture, json, options};

#[test]
fn a_published_file_imports_as_its_published_model() {
    let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    let (Some(file), Some(model)) = (named("CL_TEST_GGUF"), named("CL_TEST_MODEL")) else {
        // Not eprintln, which the test runner captures.
        let mut stderr = std::io::stderr();
        writeln!(
            stderr,
            "left out: set CL_TEST_GGUF to a file and CL_TEST_MODEL to the bf16 model directory that it was made of"
        )
        .unwrap();
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    import(&file, &out, &options(FloatDtype::Bf16)).unwrap();
    let (ours, theirs) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&model).unwrap());
    assert_eq!(ours.names(), theirs.names());
    let differing: Vec<&str> = ours
        .names()
        .into_iter()
        .filter(|n| ours.info(n) != theirs.info(n) || ours.bytes(n).unwrap() != theirs.bytes(n).unwrap())
        .collect();
    assert!(differing.is_empty(), "{} of {} tensors differ: {differing:?}", differing.len(), ours.names().len());

    let tokenizer = |dir: &PathBuf| Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let (ours, theirs) = (tokenizer(&out), tokenizer(&model));
    for text in json(&fixture("tokenizers.json"))["texts"].as_array().unwrap() {
        let text = text.as_str().unwrap();
        let ids = |t: &Tokenizer| t.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids(&ours), ids(&theirs), "{text:?}");
    }
}
