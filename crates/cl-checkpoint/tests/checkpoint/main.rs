//! Model and adapter directories: what was written can be read, damaged files are rejected by name, and partly written
//! outputs are never visible.

mod adapter;
mod atomic;
mod corrupted;
mod finite;
mod processes;
mod round_trip;
mod sharded;
mod target_parameters;

use std::fs;
use std::path::Path;

use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions};
use serde_json::json;

/// Returns a safetensors file with any header text.
fn safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Returns a header with one tensor `w` of 4 bytes.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"w":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}"#)
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

/// Writes a model with one bf16 tensor `w`.
fn write_model(dir: &Path, overwrite: bool, bytes: &[u8; 4]) -> Result<(), cl_checkpoint::Error> {
    let plan = [spec("w", Dtype::BF16, &[2])];
    let writer = CheckpointWriter::create(dir, &plan, WriteOptions { overwrite, ..WriteOptions::default() })?;
    writer.write("w", bytes)?;
    writer.put_json("config.json", &json!({"model_type": "llama"}))?;
    writer.finish(Manifest::new("model"))
}

/// Checks that no message contains that of its cause, which would then be printed twice.
fn assert_said_once(mut error: &dyn std::error::Error) {
    while let Some(cause) = error.source() {
        assert!(!error.to_string().contains(&cause.to_string()), "{error:?}");
        error = cause;
    }
}

/// Checks that the error's text contains all of `parts`, and says nothing twice.
fn assert_error<T>(case: &str, result: Result<T, cl_checkpoint::Error>, parts: &[&str]) {
    let Err(error) = result else { panic!("{case}: accepted") };
    assert_said_once(&error);
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{case}: {part:?} is not in {text:?}");
    }
}

/// Returns the names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
