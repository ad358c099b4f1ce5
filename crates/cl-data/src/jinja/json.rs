//! The filter `tojson` as defined by Transformers: `json.dumps`.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Implements `json.dumps` with the options that Transformers passes on.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let invalid = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut value = serde_json::to_value(value).map_err(invalid)?;
    if sorted == Some(true) {
        value.sort_all_objects();
    }
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        _ => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
    };
    let mut bytes = Vec::new();
    let dumps = Dumps { indent, item, key, depth: 0, empty: true };
    value.serialize(&mut Serializer::with_formatter(&mut bytes, dumps)).map_err(invalid)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(if ascii == Some(true) { escaped(&text) } else { text })
}

/// Escapes characters outside of ASCII. They only occur in strings, where an escape has the same meaning.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        }
    }
    out
}

/// Formatter for Python's layout of JSON.
struct Dumps {
    indent: Option<usize>,
    item: String,
    key: String,
    depth: usize,
    empty: bool,
}

impl Dumps {
    fn open<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, bracket: &str) -> std::io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket.as_bytes())
    }

    fn close<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, bracket: &str) -> std::io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket.as_bytes())
    }

    fn next<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.empty = false;
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }

    fn line<W: std::io::Write + ?Sized>(&self, writer: &mut W) -> std::io::Result<()> {
        self.indent.map_or(Ok(()), |n| write!(writer, "\n{}", " ".repeat(n * self.depth)))
    }
}

impl Formatter for Dumps {
    fn begin_array<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, "[")
    }
    fn end_array<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, "]")
    }
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.next(writer, first)
    }
    fn begin_object<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, "{")
    }
    fn end_object<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, "}")
    }
    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.next(writer, first)
    }
    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}
