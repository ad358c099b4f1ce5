//! Parquet files written by `datasets` and pyarrow, compared with the same rows as JSONL.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use cl_data::{Columns, Error, Example, Format, Message, Row, Split, load, load_as, load_split, read_rows};
use parquet::basic::{Compression, Type};
use parquet::file::reader::{FileReader, SerializedFileReader};

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
    for name in ["datasets", "snappy", "zstd", "gzip", "none", "lz4", "brotli"] {
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
    let expected = [("p0", "a0"), ("p1", "a1"), ("p2", "a2")].map(|(p, a)| (p.to_owned(), a.to_owned()));
    assert_eq!(pairs, expected);
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
fn columns_that_json_does_not_have_matter_only_if_they_are_used() {
    let path = fixture("extra.parquet");
    assert_eq!(load(&path, Format::Auto).unwrap().examples, [Example::pair("p", "a")]);
    assert_eq!(rows("extra.parquet")[0].keys().collect::<Vec<_>>(), ["prompt", "answer"]);
    assert_eq!(rows("bytes.parquet")[0].keys().collect::<Vec<_>>(), ["text"]);
    for (prompt, column) in [("when", "column `when`"), ("{{ prompt }} {{ image }}", "column `image`")] {
        let columns = Columns { prompt: Some(prompt.into()), answer: Some("answer".into()), messages: None };
        let message = load_as(&path, Format::Auto, &columns).unwrap_err().to_string();
        assert!(message.contains(column) && message.contains("extra.parquet"), "{message}");
    }
    // The format is not guessed from the other columns.
    let folder = tempfile::tempdir().unwrap();
    let renamed = folder.path().join("renamed.parquet");
    let bytes = replaced(&std::fs::read(path).unwrap(), b"image", b"query");
    std::fs::write(&renamed, replaced(&bytes, b"prompt", b"answe_")).unwrap();
    assert!(
        load(&renamed, Format::Auto).unwrap_err().to_string().contains("unknown format with keys [answe_, answer]")
    );
    std::fs::write(&renamed, replaced(&replaced(&bytes, b"when", b"text"), b"answer", b"answe_")).unwrap();
    assert!(load(&renamed, Format::Auto).unwrap_err().to_string().contains("column `text`"));
}

#[test]
fn conversations_from_parquet() {
    let [question, answer] = [Message::new("user", "q?"), Message::new("assistant", "a")];
    assert_eq!(load(&fixture("parts.parquet"), Format::Auto).unwrap().examples, [Example::chat([question, answer])]);
    let message = load(&fixture("image.parquet"), Format::Auto).unwrap_err().to_string();
    assert!(message.contains("row 1 (from 0): `messages`, message 0: part 1 (from 0)"), "{message}");
    let examples = load(&fixture("history.parquet"), Format::Auto).unwrap().examples;
    let turns = [("user", "q"), ("assistant", "a"), ("user", "j\nn"), ("assistant", "p")];
    let alpaca = Example::pair(cl_data::template::alpaca("i", ""), "o");
    assert_eq!(examples, [alpaca, Example::chat(turns.map(|(role, text)| Message::new(role, text)))]);
}

#[test]
fn an_unsupported_codec_is_named() {
    let bytes = std::fs::read(fixture("examples.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lzo.parquet");
    std::fs::write(&path, with_codec(&bytes, Compression::SNAPPY, Compression::LZO)).unwrap();
    let message = read_rows(&path).unwrap_err().to_string();
    assert!(message.contains("lzo.parquet: column `prompt` is compressed with LZO"), "{message}");
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

/// Not every changed byte can be detected, for example in a text; but nothing may crash, and errors name the file.
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

/// Files of a few kilobytes whose headers declare gigabytes.
#[cfg(unix)] // sets limits by a shell
#[test]
fn hostile_pages_are_errors() {
    const DATA: i64 = 0;
    const DICTIONARY: i64 = 2;
    const PLAIN: i64 = 0;
    const DELTA_LENGTH_BYTE_ARRAY: i64 = 6;
    const DELTA_BYTE_ARRAY: i64 = 7;
    const MOST: i64 = i32::MAX as i64;
    let [gzip, brotli, lz4] = [gzipped(&[0; 10_000]), brotlied(&[0; 10_000]), framed(&[0; 10_000])];
    let folder = tempfile::tempdir().unwrap();
    let frames = folder.path().join("frames.parquet");
    let raw = std::fs::read(fixture("lz4.parquet")).unwrap();
    std::fs::write(&frames, with_codec(&raw, Compression::LZ4_RAW, Compression::LZ4)).unwrap();
    // Definition levels of four values, then the lengths of texts: blocks of 128 in 4 miniblocks, and a count.
    let lengths = [&[2, 0, 0, 0, 8, 1][..], &[128, 1, 4], &varint(1 << 40), &[0]].concat();
    // No prefixes, then the same number of suffixes.
    let suffixes = [&[2, 0, 0, 0, 8, 1][..], &[128, 1, 4, 1, 0], &[128, 1, 4], &varint(1 << 40), &[0]].concat();
    let cases: [(&str, [i64; 4], &[u8], &str); 12] = [
        ("zstd", [DATA, MOST, 4, PLAIN], &[], "unpack to more than 1073741824 bytes"),
        ("snappy", [DATA, MOST, 4, PLAIN], &[], "unpack to more than 1073741824 bytes"),
        ("zstd", [DICTIONARY, 1 << 29, 4, PLAIN], &[], "a dictionary of 536870912 bytes"),
        ("none", [DICTIONARY, 99, MOST, PLAIN], &[], "a dictionary of 2147483647 values"),
        ("none", [DATA, 99, MOST, PLAIN], &[], "more than 16777216 values"),
        ("none", [DATA, -1, 4, PLAIN], &[], "a page of -1 bytes"),
        ("gzip", [DATA, 99, 4, PLAIN], &gzip, "unpacks to more bytes"),
        ("brotli", [DATA, 99, 4, PLAIN], &brotli, "unpacks to more bytes"),
        ("brotli", [DATA, 99, 4, PLAIN], &[0x11, 30], "extension with large windows"),
        ("frames", [DATA, 99, 4, PLAIN], &lz4, "unpacks to more bytes"),
        ("none", [DATA, 99, 4, DELTA_LENGTH_BYTE_ARRAY], &lengths, "1099511627776 lengths of texts"),
        ("none", [DATA, 99, 4, DELTA_BYTE_ARRAY], &suffixes, "1099511627776 lengths of texts"),
    ];
    let path = folder.path().join("hostile.parquet");
    for (name, header, data, part) in cases {
        let file = if name == "frames" { frames.clone() } else { fixture(&format!("{name}.parquet")) };
        std::fs::write(&path, with_page(&file, header, data)).unwrap();
        let message = read_rows(&path).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("hostile.parquet"), "{name} {header:?}: {message}");
    }
}

#[test]
fn a_hostile_schema_is_an_error() {
    let bytes = std::fs::read(fixture("none.parquet")).unwrap();
    let name = b"schema\x15"; // the root's name, followed by the number of its children
    let at = bytes.windows(name.len()).rposition(|w| w == name).unwrap() + name.len();
    let huge = [&bytes[..at], &varint(2 * i32::MAX as u64), &bytes[at + 1..]].concat();
    let length = u32::from_le_bytes(*bytes[..bytes.len() - 4].last_chunk().unwrap()) + 4;
    let huge = [&huge[..huge.len() - 8], &length.to_le_bytes(), b"PAR1"].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.parquet");
    std::fs::write(&path, huge).unwrap();
    let message = read_rows(&path).unwrap_err().to_string();
    assert!(message.contains("one of them with 2147483647 children"), "{message}");
}

/// The limits also hold if memory is scarce: 1.5 GiB of address space.
#[test]
fn hostile_pages_are_errors_in_little_memory() {
    let limited = "ulimit -v 1572864 && exec \"$0\" --exact hostile_pages_are_errors a_hostile_schema_is_an_error";
    let output = Command::new("sh").args(["-c", limited]).arg(std::env::current_exe().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("2 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// Returns a file whose first text column is one page; `header` has its kind, uncompressed size, number of values and
/// encoding.
fn with_page(path: &Path, [kind, uncompressed, values, encoding]: [i64; 4], data: &[u8]) -> Vec<u8> {
    let reader = SerializedFileReader::new(File::open(path).unwrap()).unwrap();
    let columns = reader.metadata().row_group(0).columns();
    let is_text = |c: &&parquet::file::metadata::ColumnChunkMetaData| {
        c.column_type() == Type::BYTE_ARRAY && c.column_descr().max_rep_level() == 0
    };
    let (start, length) = columns.iter().find(is_text).unwrap().byte_range();
    let integer = |n: i64| [&[0x15][..], &varint(((n << 1) ^ (n >> 63)) as u64)].concat();
    let header = |compressed: i64| {
        let sizes = [integer(kind), integer(uncompressed), integer(compressed)].concat();
        let (field, levels) = if kind == 2 { (0x4c, vec![]) } else { (0x2c, [integer(3), integer(3)].concat()) };
        [&sizes[..], &[field], &integer(values), &integer(encoding), &levels, &[0, 0]].concat()
    };
    // The page fills the column; a larger size may need a longer header.
    let sized = (0..length as i64).map(header).enumerate().find(|(size, h)| h.len() + size == length as usize);
    let (size, header) = sized.unwrap();
    assert!(data.len() <= size, "{} bytes into {size}", data.len());
    let mut bytes = std::fs::read(path).unwrap();
    let page = [&header, data, &vec![0; size - data.len()]].concat();
    bytes[start as usize..][..page.len()].copy_from_slice(&page);
    bytes
}

/// Returns a file whose footer declares another codec. There, the name of a column is followed by the codec (field 4,
/// an integer).
fn with_codec(bytes: &[u8], from: Compression, to: Compression) -> Vec<u8> {
    let codec = |codec| match codec {
        Compression::SNAPPY => 1,
        Compression::LZO => 3,
        Compression::LZ4 => 5,
        Compression::LZ4_RAW => 7,
        other => panic!("{other}"),
    };
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let reader = SerializedFileReader::new(file).unwrap();
    let columns = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    let names: BTreeSet<String> = columns.filter_map(|c| c.column_path().parts().last().cloned()).collect();
    names.iter().fold(bytes.to_vec(), |bytes, name| {
        let field = |value| [name.as_bytes(), &[0x15, 2 * codec(value)]].concat();
        replaced(&bytes, &field(from), &field(to))
    })
}

/// Replaces every occurrence of some bytes by others of the same length.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    while let Some(at) = bytes.windows(from.len()).position(|window| window == from) {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

fn brotlied(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, 5, 22);
    encoder.write_all(bytes).unwrap();
    encoder.into_inner()
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn varint(mut n: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
