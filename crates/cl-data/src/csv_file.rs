use std::cell::Cell;
use std::io::{self, Read};
use std::path::Path;

use serde_json::Value;

use crate::rows::{Row, TakeRow};
use crate::{Error, MAX_LINE};

/// A reader that limits the size of a record: after an unclosed quotation mark, the rest of the file would be one
/// field.
struct Bounded<'c, R> {
    reader: R,
    since: &'c Cell<usize>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.since.set(self.since.get() + n);
        if self.since.get() > MAX_LINE {
            let message = format!("a record is longer than {MAX_LINE} bytes; check for an unclosed quotation mark");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(n)
    }
}

/// Passes on the rows of a CSV or TSV file. Its first line names the fields; all values are text.
pub(crate) fn each_row(path: &Path, separator: u8, reader: impl Read, take: TakeRow<'_>) -> Result<(), Error> {
    let wrong = |error: &csv::Error| {
        let line = error.position().map_or(String::new(), |p| format!("line {}: ", p.line()));
        let what = match error.kind() {
            csv::ErrorKind::Utf8 { .. } => "not UTF-8".to_owned(),
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!("has {len} fields, but the first line has {expected_len}")
            }
            _ => error.to_string(),
        };
        Error::Form { path: path.to_owned(), message: format!("{line}{what}") }
    };
    let since = Cell::new(0);
    let mut file = csv::ReaderBuilder::new().delimiter(separator).from_reader(Bounded { reader, since: &since });
    let names = file.headers().map_err(|e| wrong(&e))?.clone();
    if let Some(name) = names.iter().enumerate().find(|(i, name)| names.iter().take(*i).any(|n| n == *name)) {
        let message = format!("the first line has the field `{}` twice", name.1);
        return Err(Error::Form { path: path.to_owned(), message });
    }
    let mut record = csv::StringRecord::new();
    let mut index = 0;
    while file.read_record(&mut record).map_err(|e| wrong(&e))? {
        since.set(0);
        let fields = names.iter().zip(&record).map(|(name, text)| (name.to_owned(), Value::from(text)));
        take(index, fields.collect::<Row>())?;
        index += 1;
    }
    Ok(())
}
