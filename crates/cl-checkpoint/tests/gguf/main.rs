//! GGUF files: element types, whole models and tokenizers compared with their references, and damaged files, which are
//! rejected by name. `fixtures/make_gguf.py` generated the references.

mod config;
mod corrupted;
mod dequant;
mod models;
mod published;
mod tokenizers;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use cl_checkpoint::gguf::{Error, FloatDtype, ImportOptions, ImportReport, import};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn options(dtype: FloatDtype) -> ImportOptions {
    ImportOptions { dtype, overwrite: false }
}

/// Imports the bytes of a file as f32.
fn import_bytes(folder: &Path, bytes: &[u8]) -> Result<ImportReport, Error> {
    let file = folder.join("tiny.gguf");
    fs::write(&file, bytes).unwrap();
    import(&file, &folder.join("out"), &options(FloatDtype::F32))
}

/// Checks that an import fails with an error that contains all of `parts` and the file's name, and writes nothing.
fn assert_refused(case: &str, folder: &Path, bytes: &[u8], parts: &[&str]) {
    let Err(error) = import_bytes(folder, bytes) else { panic!("{case}: accepted") };
    assert!(std::error::Error::source(&error).is_none(), "{case}: a cause would be printed twice");
    let text = error.to_string();
    for part in parts.iter().chain(&["tiny.gguf"]) {
        assert!(text.contains(part), "{case}: {part:?} is not in {text:?}");
    }
    let names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["tiny.gguf"], "{case}: something was left behind");
}
