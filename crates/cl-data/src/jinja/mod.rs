//! Jinja with bounds ([`check_source`], [`limit`], [`render`]), and an environment that renders as the one of Transformers
//! does.
//!
//! Source: `_cached_compile_jinja_template` in `transformers/utils/chat_template_utils.py`: blocks trimmed, loop controls,
//! `raise_exception`, `strftime_now`, `tojson` as `json.dumps` writes it, `{% generation %}`; and Python's methods, text of
//! values and white space, which templates are written for.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

use crate::python::is_space;

mod limits;

pub(crate) use limits::on_large_stack;
pub use limits::{
    MAX_CHAT_STEPS, MAX_DEPTH, MAX_ELIF, MAX_SIZE, MAX_SOURCE, MAX_STEPS, MAX_TOKENS, MAX_WORK, check_expression,
    check_method, check_source, evaluate, limit, render, size_of, spend,
};

/// An environment without templates.
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = unlimited();
    limit(&mut environment, unlimited(), MAX_CHAT_STEPS);
    environment
}

fn unlimited() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_debug(false);
    environment.set_formatter(format_value);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    environment.add_filter("trim", |text: String, chars: Option<String>| strip(&text, "strip", chars.as_deref()));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// The template with `{% generation %}` blocks as blocks that always render: the tag only marks what an assistant said, for
/// masks over tokens.
pub(crate) fn without_generation(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let name = tag[2..].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    // An unknown specifier makes chrono's Display fail, and `to_string` would panic.
    write!(text, "{}", chrono::Local::now().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: no such format: {format}")))?;
    Ok(text)
}

/// Methods of Python's types; those where minijinja-contrib differs from Python come first.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    check_method(state, value, name, args)?;
    match (value.as_str(), name) {
        (Some(text), "strip" | "lstrip" | "rstrip") => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(strip(text, name, chars).into())
        }
        (Some(text), "find" | "rfind") if args.len() == 1 => {
            let (what,): (&str,) = from_args(args)?;
            let at = if name == "find" { text.find(what) } else { text.rfind(what) };
            Ok(at.map_or(-1, |at| text[..at].chars().count() as i64).into())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Python counts four separators among white space that Unicode does not.
fn strip(text: &str, side: &str, chars: Option<&str>) -> String {
    let gone = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    match side {
        "lstrip" => text.trim_start_matches(gone),
        "rstrip" => text.trim_end_matches(gone),
        _ => text.trim_matches(gone),
    }
    .to_owned()
}

fn format_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    spend(state, value)?;
    let mut text = String::new();
    if value.kind() == ValueKind::String {
        text.push_str(value.as_str().unwrap_or_default())
    } else {
        repr(&mut text, value)
    }
    out.write_str(&text).map_err(Error::from)
}

/// What Python's `str` makes of a value that is no text.
fn repr(out: &mut String, value: &Value) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &item);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &key);
                out.push_str(": ");
                repr(out, &value.get_item(&key).unwrap_or_default());
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == '\\' || c == quote => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// `json.dumps` with the options that Transformers passes on.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
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

/// Letters outside of ASCII stand in strings only, where an escape means the same.
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

/// Python's layout of JSON.
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
