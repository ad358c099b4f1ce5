use std::borrow::Cow;
use std::fmt::Write;

use minijinja::value::{ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value};

use super::json::tojson;
use super::limits::{MAX_CHAT_STEPS, MAX_STEPS, check_method, limit, spend};
use crate::python::is_space;

/// The Python program whose rendering an environment reproduces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Transformers' `apply_chat_template`: blocks are trimmed, undefined variables are empty, `raise_exception` and
    /// `strftime_now` are defined, and `tojson` writes like `json.dumps`.
    ///
    /// Source: `_cached_compile_jinja_template` in `transformers/utils/chat_template_utils.py`.
    Transformers,
    /// lm-evaluation-harness's `apply_template`: undefined variables are errors, and a final newline is kept.
    LmEval,
}

/// Creates an environment without templates. Both dialects have Python's methods, its formatting of values and its
/// definition of white space.
pub fn environment(dialect: Dialect) -> Environment<'static> {
    let steps = match dialect {
        Dialect::Transformers => MAX_CHAT_STEPS,
        Dialect::LmEval => MAX_STEPS,
    };
    let mut environment = unlimited(dialect);
    limit(&mut environment, unlimited(dialect), steps);
    environment
}

fn unlimited(dialect: Dialect) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_debug(false);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(format_value);
    environment.set_unknown_method_callback(method);
    environment.add_filter("trim", trim);
    match dialect {
        Dialect::Transformers => {
            environment.set_trim_blocks(true);
            environment.set_lstrip_blocks(true);
            environment.add_filter("tojson", tojson);
            environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            });
            environment.add_function("strftime_now", strftime_now);
        }
        Dialect::LmEval => {
            environment.set_keep_trailing_newline(true);
            environment.set_undefined_behavior(UndefinedBehavior::Strict);
        }
    }
    environment
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    // An unknown specifier makes chrono's Display fail, and `to_string` would panic.
    write!(text, "{}", chrono::Local::now().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: no such format: {format}")))?;
    Ok(text)
}

/// Methods of Python's types. Those for which minijinja-contrib differs from Python come first.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    check_method(state, value, name, args)?;
    match (value.as_str(), name, args.len()) {
        (Some(text), "strip" | "lstrip" | "rstrip", _) => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(strip(text, name, chars).into())
        }
        (Some(text), "find" | "rfind", 1) => {
            let (what,): (&str,) = from_args(args)?;
            let at = if name == "find" { text.find(what) } else { text.rfind(what) };
            Ok(at.map_or(-1, |at| text[..at].chars().count() as i64).into())
        }
        (Some(text), "capitalize", 0) => Ok(capitalize(text).into()),
        (None, "index", 1) if value.kind() == ValueKind::Seq => index(value, &args[0]),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn trim(text: Cow<'_, str>, chars: Option<String>) -> String {
    strip(&text, "strip", chars.as_deref())
}

/// Python's `str.strip` and its variants. Python treats four separators as white space that Unicode does not.
fn strip(text: &str, side: &str, chars: Option<&str>) -> String {
    let stripped = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    match side {
        "lstrip" => text.trim_start_matches(stripped),
        "rstrip" => text.trim_end_matches(stripped),
        _ => text.trim_matches(stripped),
    }
    .to_owned()
}

/// Python's `str.capitalize`: the first letter in upper case, all others in lower case. Letters with a separate title
/// case, such as ǆ, become upper case.
fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    let mut upper = first.to_uppercase();
    let mut capital: String = upper.next().into_iter().collect();
    capital.extend(upper.flat_map(char::to_lowercase)); // ß at the start becomes Ss
    // Convert the whole text to lower case, because the form of a sigma depends on the letters around it.
    let lower = text.to_lowercase();
    capital + &lower[first.to_lowercase().map(char::len_utf8).sum::<usize>()..]
}

/// Python's `list.index`.
fn index(list: &Value, wanted: &Value) -> Result<Value, Error> {
    let found = list.try_iter()?.position(|v| v == *wanted);
    let quoted = |value: &Value| format!("{:.200}", format!("{value:?}"));
    let message = || format!("{} is not in the list {}", quoted(wanted), quoted(list));
    found.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, message()))
}

fn format_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    if value.is_undefined() && state.env().undefined_behavior() == UndefinedBehavior::Strict {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    spend(state, value)?;
    let mut text = String::new();
    if value.kind() == ValueKind::String {
        text.push_str(value.as_str().unwrap_or_default())
    } else {
        repr(&mut text, value)
    }
    out.write_str(&text).map_err(Error::from)
}

/// Formats a value that is not text like Python's `str`.
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

#[cfg(test)]
mod tests {
    use super::capitalize;

    #[test]
    fn capitals_are_python_s() {
        assert_eq!((capitalize("ßA").as_str(), capitalize("").as_str(), capitalize("ΣΑΣ")), ("Ssa", "", "Σας".into()));
    }
}
