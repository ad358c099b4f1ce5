//! Reads files line by line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use cl_checkpoint::files::open_file;

use crate::Error;

/// UTF-8 byte-order mark, which some editors write at the beginning of a file.
pub const BOM: &[u8] = b"\xef\xbb\xbf";

/// Maximum size in bytes of a line of a JSONL file or a row of a JSON list; far more than fits into a model's context.
pub const MAX_LINE: usize = 16 << 20;

/// A line with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// 1-based line number.
    pub number: usize,
    /// The bytes, including the newline, which may be missing only on the last line.
    pub bytes: Vec<u8>,
}

impl Line {
    /// Whether the line contains only white space.
    pub fn is_blank(&self) -> bool {
        self.bytes.iter().all(u8::is_ascii_whitespace)
    }
}

/// Iterator over the lines of a reader, each of at most [`MAX_LINE`] bytes.
pub struct Lines<R> {
    reader: R,
    path: PathBuf,
    number: usize,
}

/// Iterates over the lines of a regular file.
///
/// # Errors
/// Returns [`Error::File`] if the file does not exist or is not a regular file. The iterator yields [`Error::LongLine`]
/// and [`Error::Io`].
///
/// # Example
/// ```
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("log.jsonl");
/// std::fs::write(&path, "{}\n{\"cut")?;
/// let lines = cl_data::read_lines(&path)?.collect::<Result<Vec<_>, _>>()?;
/// assert_eq!((lines.len(), lines[1].number), (2, 2));
/// assert!(!lines[1].bytes.ends_with(b"\n"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_lines(path: &Path) -> Result<Lines<BufReader<File>>, Error> {
    Ok(Lines::new(BufReader::new(open_file(path)?), path, 0))
}

impl<R: BufRead> Lines<R> {
    /// Creates an iterator; `number` is the number of lines that were read before.
    pub(crate) fn new(reader: R, path: &Path, number: usize) -> Lines<R> {
        Lines { reader, path: path.to_owned(), number }
    }

    fn read(&mut self) -> Result<Option<Line>, Error> {
        let mut bytes = Vec::new();
        let most = MAX_LINE as u64 + 1;
        let read = self.reader.by_ref().take(most).read_until(b'\n', &mut bytes);
        read.map_err(|source| Error::Io { path: self.path.clone(), source })?;
        if bytes.is_empty() {
            return Ok(None);
        }
        self.number += 1;
        if bytes.len() > MAX_LINE {
            return Err(Error::LongLine { path: self.path.clone(), line: self.number, limit: MAX_LINE });
        }
        Ok(Some(Line { number: self.number, bytes }))
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Line, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_at_the_limit_is_read_and_a_longer_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.jsonl");
        let mut text = vec![b' '; MAX_LINE - 1];
        text.push(b'\n');
        std::fs::write(&path, [b"{}\n", text.as_slice()].concat()).unwrap();
        assert_eq!(read_lines(&path).unwrap().last().unwrap().unwrap().bytes.len(), MAX_LINE);
        text.insert(0, b' ');
        std::fs::write(&path, [b"{}\n", text.as_slice()].concat()).unwrap();
        let error = read_lines(&path).unwrap().last().unwrap().unwrap_err();
        assert!(matches!(error, Error::LongLine { line: 2, .. }), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn what_never_ends_is_not_opened() {
        assert!(read_lines(Path::new("/dev/zero")).err().unwrap().to_string().contains("is a device"));
    }
}
