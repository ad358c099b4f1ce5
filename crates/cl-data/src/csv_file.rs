use std::cell::Cell;
use std::io::{self, BufRead, Cursor, Read};
use std::path::Path;

use serde_json::Value;

use crate::problem::FormProblem;
use crate::row::{Row, TakeRow};
use crate::{Error, MAX_LINE};

/// A reader that limits the size of a record, because after an unclosed quotation mark the rest of the file would be
/// one field.
struct Bounded<'c, R> {
    reader: R,
    since: &'c Cell<usize>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.since.set(self.since.get() + n);
        if self.since.get() > MAX_LINE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(n)
    }
}

/// Passes each row of a CSV or TSV file to `take`. The first line contains the field names; all values are text. Without
/// a `separator`, it is detected from the first line.
pub(crate) fn each_row(
    path: &Path,
    separator: Option<u8>,
    reader: &mut dyn BufRead,
    take: TakeRow<'_>,
) -> Result<(), Error> {
    let form = |problem| Error::Form { path: path.to_owned(), problem };
    let wrong = |error| form(problem(error));
    let (separator, start) = match separator {
        Some(separator) => (separator, Vec::new()),
        None => detect(reader).map_err(|source| Error::Io { path: path.to_owned(), source })?,
    };
    let since = Cell::new(0);
    let reader = Bounded { reader: Cursor::new(start).chain(reader), since: &since };
    let mut file = csv::ReaderBuilder::new().delimiter(separator).from_reader(reader);
    let names = file.headers().map_err(wrong)?.clone();
    if let Some((_, name)) = names.iter().enumerate().find(|(i, name)| names.iter().take(*i).any(|n| n == *name)) {
        return Err(form(FormProblem::FieldTwice { name: name.to_owned() }));
    }
    let mut record = csv::StringRecord::new();
    let mut index = 0;
    while file.read_record(&mut record).map_err(wrong)? {
        since.set(0);
        let fields = names.iter().zip(&record).map(|(name, text)| (name.to_owned(), Value::from(text)));
        take(index, fields.collect::<Row>())?;
        index += 1;
    }
    Ok(())
}

/// Detects the separator from the first line: a comma if there is one outside of quotation marks, else a semicolon or a
/// tab if only one of the two occurs, else a comma. Also returns the bytes that were read.
fn detect(reader: &mut dyn BufRead) -> io::Result<(u8, Vec<u8>)> {
    let (mut read, mut found) = (Vec::new(), [(b',', false), (b';', false), (b'\t', false)]);
    let (mut quoted, mut blank) = (false, true);
    'header: while read.len() <= MAX_LINE {
        let start = read.len();
        if (&mut *reader).take(MAX_LINE as u64).read_until(b'\n', &mut read)? == 0 {
            break;
        }
        for &byte in &read[start..] {
            match byte {
                b'\n' | b'\r' if !quoted && !blank => break 'header,
                b'\n' | b'\r' => continue,
                b'"' => quoted = !quoted,
                _ => found.iter_mut().filter(|(separator, _)| *separator == byte && !quoted).for_each(|f| f.1 = true),
            }
            blank = false;
        }
    }
    let separator = match found.map(|(_, found)| found) {
        [false, true, false] => b';',
        [false, false, true] => b'\t',
        _ => b',',
    };
    Ok((separator, read))
}

fn problem(error: csv::Error) -> FormProblem {
    let line = error.position().map_or(1, csv::Position::line);
    match error.kind() {
        csv::ErrorKind::Io(e) if e.kind() == io::ErrorKind::FileTooLarge => FormProblem::LongRecord { limit: MAX_LINE },
        csv::ErrorKind::Utf8 { err, .. } => {
            FormProblem::NotUtf8 { line, field: Some(err.field()), offset: err.valid_up_to() }
        }
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            FormProblem::Fields { line, expected: *expected_len, found: *len }
        }
        _ => FormProblem::Csv { source: error },
    }
}
