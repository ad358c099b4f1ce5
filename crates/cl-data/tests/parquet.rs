//! Parquet files that `datasets` and pyarrow wrote, against the same rows as JSONL.

use std::path::{Path, PathBuf};

use cl_data::{Error, Format, Row, Split, load, load_split, read_rows};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet").join(name)
}

fn rows(name: &str) -> Vec<Row> {
    read_rows(&fixture(name)).unwrap().rows
}

#[test]
fn rows_are_those_of_the_json() {
    let json = rows("rows.jsonl");
    assert_eq!(json.len(), 11);
    for name in ["datasets", "snappy", "zstd", "gzip", "none"] {
        let parquet = rows(&format!("{name}.parquet"));
        assert_eq!(parquet.len(), json.len(), "{name}");
        for (i, (a, b)) in parquet.iter().zip(&json).enumerate() {
            assert_eq!(a, b, "{name}, row {i}");
            assert!(a.keys().eq(b.keys()), "{name}, row {i}: order of columns");
        }
    }
}

#[test]
fn the_hash_is_that_of_the_file() {
    let path = fixture("zstd.parquet");
    let hash = blake3::hash(&std::fs::read(&path).unwrap()).to_hex().to_string();
    assert_eq!(read_rows(&path).unwrap().hash, hash);
}

#[test]
fn a_file_without_rows() {
    assert!(rows("empty.parquet").is_empty());
    assert!(matches!(load(&fixture("empty.parquet"), Format::Auto), Err(Error::Empty { .. })));
}

#[test]
fn examples_from_parquet() {
    let data = load(&fixture("examples.parquet"), Format::Auto).unwrap();
    assert_eq!(data.name, "examples");
    let pairs: Vec<_> = data.examples.iter().map(|e| (e.shown(), e.answer().to_owned())).collect();
    assert_eq!(pairs, [("p0", "a0"), ("p1", "a1"), ("p2", "a2")]);
}

#[test]
fn a_split_may_be_parquet() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("examples.parquet"), folder.path().join("test.parquet")).unwrap();
    assert_eq!(load_split(folder.path(), Split::Test).unwrap().examples.len(), 3);
    let message = load_split(folder.path(), Split::Train).unwrap_err().to_string();
    assert!(message.contains("train.parquet"), "{message}");
}

#[test]
fn what_json_does_not_have_is_named() {
    let files = [
        ("bytes", "image.bytes"),
        ("date32", "when"),
        ("timestamp", "when"),
        ("timestamp_ns", "when"),
        ("time64", "when"),
        ("decimal128", "when"),
        ("map", "pairs"),
    ];
    for (file, column) in files {
        let message = read_rows(&fixture(&format!("{file}.parquet"))).unwrap_err().to_string();
        assert!(message.contains(&format!("column `{column}`")), "{file}: {message}");
        assert!(message.contains(&format!("{file}.parquet")), "{message}");
    }
}

#[test]
fn a_cut_off_file_is_an_error_that_names_it() {
    let whole = std::fs::read(fixture("zstd.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.parquet");
    for length in (4..whole.len()).step_by(97).chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..length]).unwrap();
        let message = read_rows(&path).unwrap_err().to_string();
        assert!(message.contains("cut.parquet"), "{length}: {message}");
    }
}

/// Not every changed byte can be noticed, a letter of a text cannot; but nothing may crash, and errors name the file.
#[test]
fn a_changed_byte_never_crashes() {
    let whole = std::fs::read(fixture("examples.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.parquet");
    for position in (4..whole.len()).step_by(3) {
        let mut bytes = whole.clone();
        bytes[position] ^= 0x55;
        std::fs::write(&path, &bytes).unwrap();
        if let Err(error) = read_rows(&path) {
            assert!(error.to_string().contains("bad.parquet"), "{position}: {error}");
        }
    }
}
