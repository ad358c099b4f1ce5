use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use cl_checkpoint::files::open_file;
use flate2::bufread::MultiGzDecoder;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::Value;

use crate::lines::{BOM, Lines, MAX_LINE};
use crate::problem::{FormProblem, RowProblem};
use crate::row::{Row, TakeRow, UsedColumns};
use crate::{Error, Line, csv_file, parquet_file};

/// The rows of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct RowFile {
    /// The rows, in file order.
    pub rows: Vec<Row>,
    /// Hexadecimal blake3 hash of the file.
    pub hash: String,
}

/// Reads the rows of a `.json` file (a list of objects), a `.jsonl` file (one object per line), both optionally
/// gzipped, or a `.parquet` file (structs become objects, class labels stay integers). These formats are detected from
/// the content, not the name; blank lines and a byte-order mark are skipped. Parquet columns that JSON cannot represent
/// are left out.
///
/// Detected from the name: `.csv` and `.tsv`, whose first line contains the field names and whose values are text; and
/// `.txt`, whose paragraphs (separated by blank lines) become rows with the field `text`. They may be gzipped
/// (`.csv.gz`). Fields of `.csv` are separated by commas, or by semicolons or tabs if the first line has no comma.
///
/// The file is read row by row, with rows of at most [`MAX_LINE`] bytes. Only regular files are read.
///
/// # Errors
/// Returns [`Error::NotFound`], [`Error::File`] or [`Error::Io`] if the file cannot be read, [`Error::Form`] if its
/// format is invalid or no Parquet column can be represented in JSON, [`Error::LongLine`] if a line is too long, and
/// [`Error::Row`] if a row is not an object.
///
/// # Example
/// ```
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("test.jsonl");
/// std::fs::write(&path, "{\"question\": \"1+1?\", \"answer\": \"2\"}\n")?;
/// let file = cl_data::read_rows(&path)?;
/// assert_eq!(file.rows[0]["answer"], "2");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_rows(path: &Path) -> Result<RowFile, Error> {
    let mut rows = Vec::new();
    let hash = each_row(path, &|_| Vec::new(), &mut |_, row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(RowFile { rows, hash })
}

/// Passes every row of a file to `take`, and returns the file's hash. See [`read_rows`]. A Parquet column that is `used`
/// and cannot be represented in JSON is an error.
pub(crate) fn each_row(path: &Path, used: UsedColumns<'_>, take: TakeRow<'_>) -> Result<String, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut file = BufReader::new(Hashed { file: open(path)?, hasher: blake3::Hasher::new() });
    let start = file.fill_buf().map_err(io)?;
    if start.starts_with(parquet_file::MAGIC) {
        drain(&mut file).map_err(io)?;
        let Hashed { file, hasher } = file.into_inner();
        parquet_file::each_row(path, file, used, take)?;
        return Ok(hasher.finalize().to_hex().to_string());
    }
    if start.starts_with(&[0x1f, 0x8b]) {
        let mut plain = BufReader::new(MultiGzDecoder::new(&mut file));
        rows_by_name(path, &mut plain, take)?;
    } else {
        rows_by_name(path, &mut file, take)?;
    }
    drain(&mut file).map_err(io)?;
    Ok(file.into_inner().hasher.finalize().to_hex().to_string())
}

fn open(path: &Path) -> Result<File, Error> {
    open_file(path).map_err(|error| match error {
        cl_checkpoint::Error::Io { path, source } if source.kind() == io::ErrorKind::NotFound && path.is_relative() => {
            Error::NotFound { path }
        }
        error => Error::File(error),
    })
}

/// A reader that computes a hash of what it reads.
struct Hashed {
    file: File,
    hasher: blake3::Hasher,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

fn drain(reader: &mut impl Read) -> io::Result<u64> {
    io::copy(reader, &mut io::sink())
}

/// Reads the rows of a text file: CSV, TSV or plain text according to its name, otherwise JSON.
fn rows_by_name(path: &Path, reader: &mut dyn BufRead, take: TakeRow<'_>) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    if reader.fill_buf().map_err(io)?.starts_with(BOM) {
        reader.consume(BOM.len());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    match name.trim_end_matches(".gz").rsplit_once('.').map(|(_, extension)| extension) {
        Some("csv") => csv_file::each_row(path, None, reader, take),
        Some("tsv") => csv_file::each_row(path, Some(b'\t'), reader, take),
        Some("txt") => paragraphs(path, Lines::new(reader, path, 0), take),
        _ => json_rows(path, reader, take),
    }
}

/// Reads paragraphs of plain text, separated by blank lines.
fn paragraphs(path: &Path, lines: Lines<&mut dyn BufRead>, take: TakeRow<'_>) -> Result<(), Error> {
    let (mut text, mut row) = (String::new(), 0);
    let mut hand_over = |text: &mut String| {
        let paragraph = std::mem::take(text);
        if !paragraph.trim().is_empty() {
            take(row, Row::from_iter([("text".to_owned(), Value::from(paragraph.trim_end()))]))?;
            row += 1;
        }
        Ok::<(), Error>(())
    };
    for line in lines {
        let line = line?;
        if line.is_blank() {
            hand_over(&mut text)?;
            continue;
        }
        text += utf8(path, &line)?;
        if text.len() > MAX_LINE {
            return Err(Error::LongLine { path: path.to_owned(), line: line.number, limit: MAX_LINE });
        }
    }
    hand_over(&mut text)
}

/// Reads the rows of a JSON list or of JSONL, depending on the first character.
fn json_rows(path: &Path, reader: &mut dyn BufRead, take: TakeRow<'_>) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut blank_lines = 0;
    let first = loop {
        match reader.fill_buf().map_err(io)?.first() {
            Some(&c) if c.is_ascii_whitespace() => {
                blank_lines += usize::from(c == b'\n');
                reader.consume(1);
            }
            first => break first.copied(),
        }
    };
    match first {
        Some(b'[') => list_rows(path, reader, take),
        _ => line_rows(path, Lines::new(reader, path, blank_lines), take),
    }
}

fn line_rows(path: &Path, lines: Lines<&mut dyn BufRead>, take: TakeRow<'_>) -> Result<(), Error> {
    let mut row = 0;
    for line in lines {
        let line = line?;
        if line.is_blank() {
            continue;
        }
        let problem = |error| FormProblem::JsonLine { line: line.number, error };
        let value = serde_json::from_str(utf8(path, &line)?)
            .map_err(|e| Error::Form { path: path.to_owned(), problem: problem(e) })?;
        take(row, object(path, row, value)?)?;
        row += 1;
    }
    Ok(())
}

fn utf8<'l>(path: &Path, line: &'l Line) -> Result<&'l str, Error> {
    std::str::from_utf8(&line.bytes).map_err(|e| {
        let problem = FormProblem::NotUtf8 { line: line.number as u64, field: None, offset: e.valid_up_to() };
        Error::Form { path: path.to_owned(), problem }
    })
}

fn object(path: &Path, row: usize, value: Value) -> Result<Row, Error> {
    match value {
        Value::Object(object) => Ok(object),
        other => {
            let problem = Box::new(RowProblem::NotAnObject { found: kind(&other) });
            Err(Error::Row { path: path.to_owned(), row, problem })
        }
    }
}

fn list_rows(path: &Path, reader: &mut dyn BufRead, take: TakeRow<'_>) -> Result<(), Error> {
    let left = Cell::new(MAX_LINE);
    let mut failure = None;
    let mut json = serde_json::Deserializer::from_reader(Bounded { reader, left: &left });
    let list = List { path, left: &left, take, failure: &mut failure };
    let read = json.deserialize_seq(list).and_then(|()| json.end());
    let form = |problem| Error::Form { path: path.to_owned(), problem };
    match (failure, read) {
        (Some(error), _) => Err(error),
        (None, Err(e)) if e.io_error_kind() == Some(io::ErrorKind::FileTooLarge) => {
            Err(form(FormProblem::LongRow { limit: MAX_LINE }))
        }
        (None, Err(e)) if e.is_io() => Err(Error::Io { path: path.to_owned(), source: e.into() }),
        (None, Err(source)) => Err(form(FormProblem::JsonList { source })),
        (None, Ok(())) => Ok(()),
    }
}

/// A reader that limits the number of bytes.
struct Bounded<'a> {
    reader: &'a mut dyn BufRead,
    left: &'a Cell<usize>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        let left = self.left.get().checked_sub(n);
        self.left.set(left.ok_or(io::ErrorKind::FileTooLarge)?);
        Ok(n)
    }
}

/// Passes the rows of a list to the callback as they are parsed. The callback's errors are stored separately, because
/// the parser's error type cannot carry them.
struct List<'a, 'f> {
    path: &'a Path,
    left: &'a Cell<usize>,
    take: TakeRow<'a>,
    failure: &'f mut Option<Error>,
}

impl<'de> Visitor<'de> for List<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut row = 0;
        while let Some(value) = list.next_element::<Value>()? {
            self.left.set(MAX_LINE);
            if let Err(error) = object(self.path, row, value).and_then(|object| (self.take)(row, object)) {
                *self.failure = Some(error);
                return Err(serde::de::Error::custom("a row is wrong"));
            }
            row += 1;
        }
        // There is no limit after the list, where anything but white space is an error.
        self.left.set(usize::MAX);
        Ok(())
    }
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn write(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    /// Returns a row whose JSON has `bytes` bytes.
    fn row(bytes: usize) -> Vec<u8> {
        [br#"{"a":""#.as_slice(), &vec![b'x'; bytes - 8], br#""}"#].concat()
    }

    #[test]
    fn rows_of_a_list_are_bounded_each_by_itself() {
        let three = [b"[".as_slice(), &row(MAX_LINE - 1), b",", &row(MAX_LINE - 2), b", {}]"].concat();
        let (_folder, path) = write(&three);
        assert_eq!(read_rows(&path).unwrap().rows.len(), 3);
        for long in [[b"[{},".as_slice(), &row(MAX_LINE + 1), b"]"].concat(), row(MAX_LINE + 1)] {
            let (_folder, path) = write(&long);
            let message = read_rows(&path).unwrap_err().to_string();
            assert!(message.contains("16777216 bytes") && message.contains("x.json"), "{message}");
        }
    }

    #[test]
    fn the_hash_is_that_of_the_whole_file() {
        for content in ["[{\"a\": 1}]  \n", "\n\n{\"a\": 1}\n\n"] {
            let (_folder, path) = write(content.as_bytes());
            let file = read_rows(&path).unwrap();
            assert_eq!(file.hash, blake3::hash(content.as_bytes()).to_hex().to_string());
            assert_eq!(file.rows.len(), 1);
        }
    }

    #[test]
    fn what_is_wrong_in_a_list_is_said_with_its_place() {
        for (content, part) in [
            ("[{}, 3]", "row 1 (from 0): expected an object"),
            ("[{},\n{\"a\"]", "line 2"),
            ("[{}] x", "trailing characters"),
            ("\n\n{}\n{\"a\"", "line 4"),
        ] {
            let (_folder, path) = write(content.as_bytes());
            let message = read_rows(&path).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("train.jsonl");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for (path, part) in [(fifo.as_path(), "is a FIFO"), (Path::new("/dev/zero"), "is a device")] {
            let message = read_rows(path).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
