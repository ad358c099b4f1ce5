//! Damaged safetensors files.

use std::fs;
use std::path::Path;

use cl_checkpoint::{Checkpoint, SafetensorsFile, TensorSource};
use proptest::prelude::*;

use super::{assert_error, one, safetensors};

#[test]
fn every_damage_is_an_error_that_names_file_and_tensor() {
    let f32s = |offsets: &str| one(r#""F32""#, "[1]", offsets);
    let two = |a: &str, b: &str| {
        let entry = |o: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{o}}}"#);
        format!(r#"{{"v":{},"w":{}}}"#, entry(a), entry(b))
    };
    let shape = |dtype: &str, shape: &str| one(&format!("{dtype:?}"), shape, "[0,4]");
    let metadata = |value: &str| format!(r#"{{"__metadata__":{value},{}"#, &f32s("[0,4]")[1..]);
    let deep = "[".repeat(100_000);
    let (w, four) = ("`w`", [0u8; 4]);
    let rows: Vec<(&str, Vec<u8>, Vec<&str>)> = vec![
        ("empty file", vec![], vec!["the file is empty"]),
        ("no room for the length", vec![1; 7], vec!["7 bytes, but a header needs at least 8"]),
        ("header length beyond the file", [&9u64.to_le_bytes()[..], b"{}"].concat(), vec!["claims 9", "has 2"]),
        ("huge header length", [&u64::MAX.to_le_bytes()[..], b"{}"].concat(), vec!["claims 18446744073709551615"]),
        ("pickle", b"PK\x03\x04 archive/data.pkl".to_vec(), vec!["truncated or another format"]),
        ("not UTF-8", safetensors(b"{\"\xff\":1}", &[]), vec!["not UTF-8"]),
        ("no header", safetensors("", &[]), vec!["not valid JSON"]),
        ("not JSON", safetensors("{'w'}", &[]), vec!["not valid JSON"]),
        ("a list", safetensors("[]", &[]), vec!["an object of tensors"]),
        ("null", safetensors("null", &[]), vec!["an object of tensors"]),
        ("text after the object", safetensors("{} x", &[]), vec!["trailing characters"]),
        ("bytes after the object", safetensors("{}\0", &[]), vec!["trailing characters"]),
        ("deep nesting", safetensors(format!(r#"{{"w":{deep}"#), &[]), vec![w]),
        ("header cut off", safetensors(r#"{"w":{"dtype":"F32""#, &four), vec![w, "EOF"]),
        ("a tensor twice", safetensors(two("[0,4]", "[4,8]").replace("\"v\"", "\"w\""), &[0; 8]), vec![w, "twice"]),
        ("a dtype twice", safetensors(r#"{"w":{"dtype":"F32","dtype":"I32"}}"#, &four), vec![w, "duplicate field"]),
        ("an entry that is a number", safetensors(r#"{"w":3}"#, &[]), vec![w, "invalid type"]),
        (
            "an entry without shape",
            safetensors(r#"{"w":{"dtype":"F32","data_offsets":[0,4]}}"#, &four),
            vec![w, "shape"],
        ),
        ("an unknown key", safetensors(r#"{"w":{"dtype":"F32","strides":[1]}}"#, &four), vec![w, "strides"]),
        ("overlapping", safetensors(two("[0,4]", "[2,6]"), &[0; 6]), vec![w, "overlaps v"]),
        ("the same place", safetensors(two("[0,4]", "[0,4]"), &four), vec![w, "overlaps v"]),
        (
            "an empty tensor inside another",
            safetensors(two("[0,4]", "[2,2]").replace(r#"[1],"data_offsets":[2"#, r#"[0],"data_offsets":[2"#), &four),
            vec![w, "overlaps v"],
        ),
        ("a gap before", safetensors(f32s("[4,8]"), &[0; 8]), vec![w, "leaves a gap"]),
        ("a gap between", safetensors(two("[0,4]", "[5,9]"), &[0; 9]), vec![w, "leaves a gap after v"]),
        (
            "a Git LFS pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n".to_vec(),
            vec!["Git LFS pointer", "git lfs pull"],
        ),
        ("trailing bytes", safetensors(f32s("[0,4]"), &[0; 5]), vec!["byte 4 of 5", "trailing bytes"]),
        ("bytes of no tensor", safetensors("{}", &[0; 1]), vec!["byte 0 of 1"]),
        ("data cut off", safetensors(f32s("[0,4]"), &[0; 3]), vec![w, "[0, 4] lie outside the file's 3 bytes"]),
        ("reversed offsets", safetensors(f32s("[4,0]"), &four), vec![w, "[4, 0] lie outside"]),
        ("negative offset", safetensors(f32s("[-4,0]"), &four), vec![w, "-4"]),
        ("fractional offset", safetensors(f32s("[0,4.0]"), &four), vec![w, "floating point"]),
        ("overflowing offset", safetensors(f32s("[0,18446744073709551616]"), &four), vec![w, "floating point"]),
        (
            "largest offsets",
            safetensors(f32s("[18446744073709551611,18446744073709551615]"), &four),
            vec![w, "lie outside"],
        ),
        ("one offset", safetensors(f32s("[0]"), &four), vec![w, "length 1"]),
        ("three offsets", safetensors(f32s("[0,4,8]"), &four), vec![w]),
        ("unknown dtype", safetensors(shape("F33", "[1]"), &four), vec![w, "F33"]),
        ("dtype in lower case", safetensors(shape("f32", "[1]"), &four), vec![w, "f32"]),
        ("dtype a number", safetensors(one("32", "[1]", "[0,4]"), &four), vec![w]),
        (
            "shape too long for its bytes",
            safetensors(shape("F32", "[2]"), &four),
            vec![w, "takes 8 bytes", "contain 4"],
        ),
        (
            "shape too short for its bytes",
            safetensors(shape("U8", "[3]"), &four),
            vec![w, "takes 3 bytes", "contain 4"],
        ),
        (
            "shape product beyond 64 bits",
            safetensors(shape("F32", "[4294967296,4294967296,1]"), &four),
            vec![w, "too large"],
        ),
        ("bits beyond 64 bits", safetensors(shape("F64", "[2305843009213693952]"), &four), vec![w, "too large"]),
        ("half a byte", safetensors(shape("F4", "[7]"), &four), vec![w, "not a whole number of bytes"]),
        ("negative dimension", safetensors(shape("F32", "[-1]"), &four), vec![w, "-1"]),
        ("fractional dimension", safetensors(shape("F32", "[1.0]"), &four), vec![w, "floating point"]),
        ("shape no list", safetensors(shape("F32", "1"), &four), vec![w]),
        ("metadata a number", safetensors(metadata("3"), &four), vec!["__metadata__ is not a map of strings"]),
        ("metadata a list", safetensors(metadata("[]"), &four), vec!["__metadata__ is not a map of strings"]),
        (
            "metadata with a number",
            safetensors(metadata(r#"{"step":3}"#), &four),
            vec!["__metadata__ is not a map of strings"],
        ),
        ("metadata twice", safetensors(metadata(r#"{},"__metadata__":{}"#), &four), vec!["__metadata__", "twice"]),
    ];
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    let path = folder.path().join("model.safetensors");
    for (case, bytes, mut parts) in rows {
        fs::write(&path, bytes).unwrap();
        parts.push(path.to_str().unwrap());
        assert_error(case, SafetensorsFile::open(&path), &parts);
        assert_error(case, Checkpoint::open(folder.path()), &parts);
    }
}

#[test]
fn a_header_beyond_the_limit_of_the_format_is_refused_unread() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let length = 100_000_001u64;
    fs::write(&path, length.to_le_bytes()).unwrap();
    // A sparse file, which uses no disk space.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8 + length).unwrap();
    assert_error("long header", SafetensorsFile::open(&path), &["x.safetensors", "claims 100000001 bytes"]);
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    assert_error("nothing", SafetensorsFile::open(&path), &["model.safetensors", "not found"]);
    fs::create_dir(&path).unwrap();
    assert_error("a directory", SafetensorsFile::open(&path), &["model.safetensors", "expected a regular file"]);
}

#[test]
fn what_the_format_allows_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let header = r#" {"b":{"shape":[],"dtype":"BF16","data_offsets":[0,2]},"empty":{"dtype":"I64","shape":[3,0],"data_offsets":[2,2]},
        "":{"dtype":"F4","shape":[4],"data_offsets":[2,4]},"__metadata__":{"format":"pt"}}   "#;
    fs::write(&path, safetensors(header, &[1, 2, 3, 4])).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.names(), ["", "b", "empty"]);
    assert_eq!(file.metadata()["format"], "pt");
    assert_eq!((file.bytes("b").unwrap(), file.bytes("").unwrap()), (&[1, 2][..], &[3, 4][..]));
    assert_eq!(file.bytes("empty").unwrap(), [0u8; 0]);
    assert_eq!((file.info("empty").unwrap().elements(), file.info("b").unwrap().elements()), (0, 1));
    assert_error("a name that is not there", file.bytes("c"), &["x.safetensors", "`c` not found"]);
    fs::write(&path, safetensors("{}", &[])).unwrap();
    assert!(SafetensorsFile::open(&path).unwrap().names().is_empty());
}

fn small_file() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}"#;
    safetensors(header, b"elevenbytes")
}

#[test]
fn a_file_cut_off_anywhere_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.safetensors");
    let whole = small_file();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert_error(&format!("{length} bytes"), SafetensorsFile::open(&path), &["cut.safetensors"]);
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(SafetensorsFile::open(&path).unwrap().bytes("b").unwrap(), b"tes");
}

/// Opens a file and, if it is accepted, reads everything.
fn read_all(path: &Path) {
    if let Ok(file) = SafetensorsFile::open(path) {
        for name in file.names() {
            let info = file.info(name).unwrap();
            assert_eq!(file.bytes(name).unwrap().len(), info.byte_len());
        }
    }
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flipped.safetensors");
        let mut bytes = small_file();
        for (index, byte) in flips {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        fs::write(&path, bytes).unwrap();
        read_all(&path);
    }

    /// Random digits reach more code than random bytes, because the header mostly remains valid JSON.
    #[test]
    fn flipped_numbers_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 0..10u8), 1..8)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flipped.safetensors");
        let mut bytes = small_file();
        let digits: Vec<usize> = (8..bytes.len() - 11).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (index, digit) in flips {
            bytes[digits[index.index(digits.len())]] = b'0' + digit;
        }
        fs::write(&path, bytes).unwrap();
        read_all(&path);
    }
}
