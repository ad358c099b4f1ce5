//! The limits; [the module's documentation](super) has a table of them.

use std::io::{self, Write};
use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Expression, State, Template, filters, functions};

/// Maximum size of a template in bytes. The longest published chat templates have some tens of thousands.
pub const MAX_SOURCE: usize = 256 << 10;
/// Maximum number of tokens in one `{{ … }}` or `{% … %}`.
pub const MAX_TOKENS: usize = 2000;
/// Maximum number of `elif` branches in a template.
pub const MAX_ELIF: usize = 500;
/// Maximum number of instructions in one rendering. Nesting a list in another takes eight of them, and lists nested
/// this deep can still be dropped on a stack of 2 MiB.
pub const MAX_STEPS: u64 = 50_000;
/// Maximum number of instructions in one rendering that has its own, larger stack.
pub const MAX_CHAT_STEPS: u64 = 200_000;
/// Maximum size in bytes of the output of one rendering, and of each value in it.
pub const MAX_SIZE: usize = 64 << 20;
/// Maximum depth of nested lists.
pub const MAX_DEPTH: usize = 100;
/// Maximum total size in bytes of all values that operators, literals, filters and methods take or make in one
/// rendering.
pub const MAX_WORK: usize = 512 << 20;
/// Maximum size in bytes of text between tags inside macros, recursive loops, `{% set %}…{% endset %}` and other
/// captured blocks.
pub const MAX_CAPTURED: usize = 16 << 10;
/// Maximum of numbers that determine the size of a result: widths, items of a batch, indents.
const MAX_WIDTH: i64 = 10_000;
/// Number of bytes that an item of a list is counted as.
const ITEM: usize = 32;

pub(super) fn too_large(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.to_string())
}

/// Returns an error, as text, if a template is too long to be parsed safely.
pub(super) fn check_source(source: &str) -> Result<(), String> {
    if source.len() > MAX_SOURCE {
        return Err(format!("a template of {} bytes; at most {MAX_SOURCE} are read", source.len()));
    }
    let mut elif = 0;
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let Some((kind, inside)) =
            rest[start..].split_at_checked(2).filter(|(kind, _)| ["{%", "{{", "{#"].contains(kind))
        else {
            rest = &rest[start + 1..];
            continue;
        };
        if kind == "{#" {
            rest = inside.find("#}").map_or("", |end| &inside[end + 2..]);
            continue;
        }
        elif += usize::from(inside.trim_start_matches(['-', '+', ' ', '\n', '\t']).starts_with("elif"));
        if elif > MAX_ELIF {
            return Err(format!("more than {MAX_ELIF} `elif`"));
        }
        rest = after_tag(inside, if kind == "{{" { "}}" } else { "%}" })?;
    }
    Ok(())
}

/// Like [`check_source`], for an expression.
pub(super) fn check_expression(source: &str) -> Result<(), String> {
    if source.len() > MAX_SOURCE {
        return Err(format!("an expression of {} bytes; at most {MAX_SOURCE} are read", source.len()));
    }
    after_tag(source, "\0").map(|_| ())
}

/// Returns the source after a tag, counting the tag's tokens: names, numbers, strings and symbols.
fn after_tag<'s>(inside: &'s str, end: &str) -> Result<&'s str, String> {
    let (mut tokens, mut at, bytes) = (0, 0, inside.as_bytes());
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || !b.is_ascii();
    while at < bytes.len() {
        let rest = &bytes[at..];
        if rest.starts_with(end.as_bytes()) {
            return Ok(&inside[at + end.len()..]);
        }
        at += match bytes[at] {
            b if b.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            quote @ (b'"' | b'\'') => 1 + text_length(&rest[1..], quote),
            b if word(b) => rest.iter().take_while(|&&b| word(b)).count(),
            _ => 1,
        };
        tokens += 1;
        if tokens > MAX_TOKENS {
            return Err(format!("a tag of more than {MAX_TOKENS} tokens"));
        }
    }
    Ok("")
}

/// Returns the number of bytes of a string after its opening quote, including the closing quote.
fn text_length(bytes: &[u8], quote: u8) -> usize {
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b if b == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Sets the limits of an environment that already has its own filters. `plain` has the same filters and settings, and
/// does the work of the filters. `steps` is the number of instructions allowed in one rendering.
pub(super) fn limit(environment: &mut Environment<'_>, plain: Environment<'static>, steps: u64) {
    environment.set_fuel(Some(steps));
    let plain = Arc::new(plain);
    for name in FILTERS {
        let plain = plain.clone();
        environment.add_filter(name, move |state: &State, args: Rest<Value>| {
            check_filter(state, name, &args)?;
            plain.empty_state().apply_filter(name, &args)
        });
    }
    environment.add_filter(FILTER, |state: &State, value: Value| spend(state, &value).map(|()| value));
    // These look up other filters and tests by name; they must find those with limits.
    environment.add_filter("map", |state: &State, value: Value, args: Rest<Value>| {
        spend(state, &value)?;
        filters::map(state, value, args)
    });
    for (name, by_attribute) in [("select", false), ("reject", false), ("selectattr", true), ("rejectattr", true)] {
        environment.add_filter(name, move |state: &State, value: Value, mut args: Rest<Value>| {
            spend(state, &value)?;
            selected(state, name, by_attribute, value, &mut args)
        });
    }
    environment.add_function("dict", |state: &State, value: Option<Value>, named: Kwargs| {
        let dict = functions::dict(value, named)?;
        spend(state, &dict).map(|()| dict)
    });
    environment.add_function("range", |lower: i64, upper: Option<i64>, step: Option<i64>| {
        let (lower, upper, step) = (upper.map_or(0, |_| lower), upper.unwrap_or(lower), step.unwrap_or(1));
        range(lower, upper, step)
    });
}

/// The filter that checks a value and returns it.
pub(super) const FILTER: &str = "bounded";
/// Filters of the engine that process a whole value, or whose arguments determine the size of the result.
const FILTERS: [&str; 28] = [
    "lower",
    "upper",
    "title",
    "capitalize",
    "replace",
    "dictsort",
    "items",
    "reverse",
    "trim",
    "join",
    "split",
    "lines",
    "min",
    "max",
    "sort",
    "list",
    "string",
    "batch",
    "slice",
    "sum",
    "indent",
    "groupby",
    "unique",
    "chain",
    "zip",
    "pprint",
    "format",
    "tojson",
];

fn selected(
    state: &State,
    name: &str,
    by_attribute: bool,
    value: Value,
    args: &mut Vec<Value>,
) -> Result<Vec<Value>, Error> {
    let mut next = || if args.is_empty() { None } else { Some(args.remove(0)) };
    let text = |value: Value| match value.as_str() {
        Some(text) => Ok(text.to_owned().into()),
        None => Err(too_large(format!("{name} takes names, not {value:?}"))),
    };
    let attribute = if by_attribute { next() } else { None };
    let test = next().map(text).transpose()?;
    let rest = Rest(std::mem::take(args));
    match (name, attribute.map(text).transpose()?) {
        ("select", _) => filters::select(state, value, test, rest),
        ("reject", _) => filters::reject(state, value, test, rest),
        (_, None) => Err(Error::from(ErrorKind::MissingArgument)),
        ("selectattr", Some(attribute)) => filters::selectattr(state, value, attribute, test, rest),
        (_, Some(attribute)) => filters::rejectattr(state, value, attribute, test, rest),
    }
}

/// Python's `range`, limited to 10,000 numbers.
fn range(lower: i64, upper: i64, step: i64) -> Result<Value, Error> {
    if step == 0 {
        return Err(too_large("range: a step of 0"));
    }
    let (lower, upper, step) = (i128::from(lower), i128::from(upper), i128::from(step));
    let distance = if step > 0 { upper - lower } else { lower - upper };
    let numbers = if distance <= 0 { 0 } else { (distance - 1) / step.abs() + 1 };
    if numbers > i128::from(MAX_WIDTH) {
        return Err(too_large(format!("range: {numbers} numbers; the limit is {MAX_WIDTH}")));
    }
    Ok((0..numbers).map(|i| Value::from(lower + i * step)).collect())
}

/// Returns an error if a filter would be given, or would produce, too large a value.
fn check_filter(state: &State, name: &str, args: &[Value]) -> Result<(), Error> {
    args.iter().try_for_each(|value| spend(state, value))?;
    let text = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or_default();
    match name {
        "batch" | "slice" | "indent" | "tojson" => check_widths(name, args)?,
        "replace" => check_replaced(text(0), text(1), text(2))?,
        "join" => check_joined(args.first(), text(1))?,
        "format" => check_format(text(0), '%', &args[1..])?,
        _ => {}
    }
    if name == "indent" {
        let lines = text(0).bytes().filter(|b| *b == b'\n').count();
        check_size("indent", text(0).len().saturating_add(lines.saturating_mul(widest(args) as usize)))?;
    }
    Ok(())
}

/// Returns an error if a method of a text or list would be given, or would produce, too large a value.
pub(super) fn check_method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<(), Error> {
    spend(state, value)?;
    args.iter().try_for_each(|value| spend(state, value))?;
    let Some(own) = value.as_str() else { return Ok(()) };
    let text = |i: usize| args.get(i).and_then(Value::as_str).unwrap_or_default();
    match name {
        "replace" => check_replaced(own, text(0), text(1)),
        "join" => check_joined(args.first(), own),
        "format" => check_format(own, '{', args),
        // The engine's own implementation would not terminate.
        "count" if text(0).is_empty() => Err(too_large("count of an empty text")),
        _ => Ok(()),
    }
}

fn check_size(what: &str, size: usize) -> Result<(), Error> {
    if size <= MAX_SIZE {
        return Ok(());
    }
    Err(too_large(format!("{what}: the result would have {size} bytes; the limit is {MAX_SIZE}")))
}

/// Returns the largest number among the arguments, including named ones.
fn widest(args: &[Value]) -> i64 {
    let number = |value: &Value| if value.is_number() { i64::try_from(value.clone()).unwrap_or(i64::MAX) } else { 0 };
    let named = |value: &Value| {
        let kwargs = Kwargs::try_from(value.clone()).ok()?;
        kwargs.args().filter_map(|name| kwargs.peek::<Value>(name).ok()).map(|v| number(&v)).max()
    };
    args.iter().skip(1).map(|value| named(value).unwrap_or_else(|| number(value))).max().unwrap_or(0)
}

fn check_widths(name: &str, args: &[Value]) -> Result<(), Error> {
    let widest = widest(args);
    if widest <= MAX_WIDTH {
        return Ok(());
    }
    Err(too_large(format!("{name}: {widest} is too large; the limit is {MAX_WIDTH}")))
}

fn check_replaced(text: &str, old: &str, new: &str) -> Result<(), Error> {
    let places = text.matches(old).count();
    check_size("replace", text.len().saturating_add(places.saturating_mul(new.len())))
}

fn check_joined(list: Option<&Value>, separator: &str) -> Result<(), Error> {
    let items = list.and_then(Value::len).unwrap_or(0);
    check_size("join", items.saturating_mul(separator.len()))
}

/// Checks widths and precisions, which are part of the format or, for `%*d`, among the arguments.
fn check_format(format: &str, mark: char, args: &[Value]) -> Result<(), Error> {
    for field in format.split(mark).skip(1) {
        let end = if mark == '{' { field.find('}') } else { field.find(|c: char| c.is_ascii_alphabetic() || c == '%') };
        let digits = field[..end.unwrap_or(field.len())].split(|c: char| !c.is_ascii_digit());
        if digits.map(|run| run.trim_start_matches('0')).any(|run| run.len() > 4) {
            return Err(too_large(format!("format: a width of more than {MAX_WIDTH}")));
        }
    }
    if mark == '%'
        && format.contains('*')
        && args.iter().any(|v| v.is_number() && widest(&[Value::UNDEFINED, v.clone()]) > MAX_WIDTH)
    {
        return Err(too_large(format!("format: a width of more than {MAX_WIDTH}")));
    }
    Ok(())
}

/// Counts a value towards [`MAX_WORK`]. Returns an error if that is exceeded, or if the value is too large or too deep.
pub(super) fn spend(state: &State, value: &Value) -> Result<(), Error> {
    const WORK: &str = "cl.work";
    let size = size_of(value)?;
    let done = state.get_temp(WORK).and_then(|v| usize::try_from(v).ok()).unwrap_or(0).saturating_add(size);
    state.set_temp(WORK, Value::from(done));
    if done > MAX_WORK {
        return Err(too_large(format!("works on more than {MAX_WORK} bytes in one rendering")));
    }
    Ok(())
}

/// Returns the size of a value in bytes, or an error if it exceeds [`MAX_SIZE`] or [`MAX_DEPTH`].
pub(super) fn size_of(value: &Value) -> Result<usize, Error> {
    let mut left = MAX_SIZE;
    walk(value, MAX_DEPTH, &mut left)?;
    Ok(MAX_SIZE - left)
}

fn walk(value: &Value, depth: usize, left: &mut usize) -> Result<(), Error> {
    let bytes = ITEM + value.as_str().map_or(0, str::len);
    *left = left
        .checked_sub(bytes)
        .ok_or_else(|| too_large(format!("a value of more than {MAX_SIZE} bytes, {ITEM} an item of a list")))?;
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    let deeper = depth.checked_sub(1).ok_or_else(|| too_large(format!("lists nested deeper than {MAX_DEPTH}")))?;
    for item in value.try_iter().into_iter().flatten() {
        walk(&item, deeper, left)?;
        if value.kind() == ValueKind::Map {
            walk(&value.get_item(&item).unwrap_or_default(), deeper, left)?;
        }
    }
    Ok(())
}

/// Runs a function that may recurse deeper than this thread's stack allows. Memory is only used as far as it is needed.
pub(crate) fn on_large_stack<T: Send>(run: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(256 << 20).spawn_scoped(scope, run)?;
        thread.join().map_err(|_| io::Error::other("rendering panicked"))
    })
}

/// Renders a template. Returns the template's own error, or one if its output exceeds [`MAX_SIZE`].
pub(super) fn render(template: &Template<'_, '_>, context: Value) -> Result<String, Error> {
    let mut out = Bounded(Vec::new());
    template.render_captured_to(context, &mut out).map_err(in_words)?;
    String::from_utf8(out.0).map_err(too_large)
}

/// Evaluates an expression. Returns the expression's own error, or one if its value exceeds [`MAX_SIZE`].
pub(super) fn evaluate(expression: &Expression<'_, '_>, context: Value) -> Result<Value, Error> {
    let value = expression.eval(context).map_err(in_words)?;
    size_of(&value).map(|_| value)
}

/// Rewords the engine's errors about limits, which do not mention templates.
fn in_words(error: Error) -> Error {
    match error.kind() {
        ErrorKind::OutOfFuel => too_large("takes too many steps; check for nested loops"),
        ErrorKind::WriteFailure => too_large(format!("writes more than {MAX_SIZE} bytes")),
        _ => error,
    }
}

struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_SIZE {
            return Err(io::Error::other("too much output"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
