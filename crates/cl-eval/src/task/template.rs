//! Texts and values out of rows: Jinja templates and expressions, with the methods that Python's texts and lists have.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::LazyLock;

use cl_data::jinja;
use minijinja::value::ValueKind;
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Expression, Output, State, UndefinedBehavior, Value, escape_formatter,
};
use minijinja_contrib::pycompat;
use regex::Regex;

use crate::error::shortened;
use crate::metrics::{python_space, python_strip};

/// Templates as Jinja2 renders them for lm-eval: what is not there is an error, a newline at the end stays, nothing is
/// escaped.
///
/// Templates come from strangers: [`jinja`] bounds what they may do.
pub(crate) fn environment<'e>() -> Environment<'e> {
    let mut environment = unlimited();
    jinja::limit(&mut environment, unlimited(), jinja::MAX_STEPS);
    environment.set_formatter(format_value);
    environment
}

fn unlimited<'e>() -> Environment<'e> {
    let mut environment = Environment::new();
    environment.set_keep_trailing_newline(true);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.add_filter("hellaswag_clean", |text: Cow<'_, str>| hellaswag_clean(&text));
    environment
}

fn format_value(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    if value.is_undefined() {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    jinja::spend(state, value)?;
    escape_formatter(out, state, value)
}

/// A text with `{{ … }}` in it.
pub(crate) struct Template<'e>(minijinja::Template<'e, 'e>);

impl<'e> Template<'e> {
    pub(crate) fn new(environment: &'e Environment<'e>, source: &'e str) -> Result<Template<'e>, String> {
        jinja::check_source(source)?;
        environment.template_from_str(source).map(Template).map_err(|e| describe(&e))
    }

    pub(crate) fn render(&self, row: &Value) -> Result<String, String> {
        let missing = || missing(&self.0.undeclared_variables(false), row);
        jinja::render(&self.0, row.clone()).map_err(|e| missing().unwrap_or_else(|| describe(&e)))
    }
}

/// What would stand between `{{` and `}}`, as a value.
pub(crate) struct Formula<'e>(Expression<'e, 'e>);

impl<'e> Formula<'e> {
    pub(crate) fn new(environment: &'e Environment<'e>, source: &'e str) -> Result<Formula<'e>, String> {
        jinja::check_expression(source)?;
        environment.compile_expression(source).map(Formula).map_err(|e| describe(&e))
    }

    pub(crate) fn value(&self, row: &Value) -> Result<Value, String> {
        let missing = || missing(&self.0.undeclared_variables(false), row);
        let value = jinja::evaluate(&self.0, row.clone()).map_err(|e| missing().unwrap_or_else(|| describe(&e)))?;
        if value.is_undefined() {
            return Err(missing().unwrap_or_else(|| "it has no value".to_owned()));
        }
        Ok(value)
    }
}

/// Names that are there without a row.
const FUNCTIONS: [&str; 4] = ["range", "dict", "debug", "namespace"];

/// The engine says that something is undefined, but not what.
fn missing(wanted: &HashSet<String>, row: &Value) -> Option<String> {
    let mut absent: Vec<String> = wanted
        .iter()
        .filter(|name| !FUNCTIONS.contains(&name.as_str()))
        .filter(|name| row.get_attr(name).map_or(true, |v| v.is_undefined()))
        .map(|n| format!("`{n}`"))
        .collect();
    absent.sort_unstable();
    let has: Vec<String> = row.try_iter().ok()?.map(|k| k.to_string()).collect();
    (!absent.is_empty()).then(|| shortened(&format!("no {}; the row has {}", absent.join(", "), has.join(", "))))
}

/// The error with its causes, without the place in a template of one line.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    shortened(&text.replace(" (in <string>:1)", "").replace(" (in <expression>:1)", ""))
}

/// Python's methods: those whose white space or capitals differ from Rust's here, the others from `minijinja_contrib`.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    jinja::check_method(state, value, name, args)?;
    match (value.as_str(), name, args) {
        (Some(text), "strip", []) => Ok(python_strip(text).into()),
        (Some(text), "lstrip", []) => Ok(text.trim_start_matches(python_space).into()),
        (Some(text), "rstrip", []) => Ok(text.trim_end_matches(python_space).into()),
        (Some(text), "capitalize", []) => Ok(capitalize(text).into()),
        (None, "index", [wanted]) if value.kind() == ValueKind::Seq => index(value, wanted),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Python's `list.index`.
fn index(list: &Value, wanted: &Value) -> Result<Value, Error> {
    let found = list.try_iter()?.position(|v| v == *wanted);
    let message = || shortened(&format!("{wanted:?} is not in the list {list:?}"));
    found.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, message()))
}

/// Python's `str.capitalize`: the first letter large, all others small. Letters with a title form of their own, such as ǆ,
/// become capitals.
fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    let mut upper = first.to_uppercase();
    let mut capital: String = upper.next().into_iter().collect();
    capital.extend(upper.flat_map(char::to_lowercase)); // ß begins a word as Ss
    // Small letters of the whole: what a sigma becomes depends on the letters around it.
    let small = text.to_lowercase();
    capital + &small[first.to_lowercase().map(char::len_utf8).sum::<usize>()..]
}

/// lm-eval's clean-up of HellaSwag's texts, whose WikiHow part has `[title]`, `[step]` and the like in it: stripped, ` [title]`
/// made a full stop, other brackets removed with what is in them, two spaces made one.
fn hellaswag_clean(text: &str) -> String {
    static BRACKETS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a valid pattern"));
    let text = python_strip(text).replace(" [title]", ". ");
    BRACKETS.replace_all(&text, "").replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn render(template: &str) -> Result<String, String> {
        let row = context! { text => "\u{1c} a b\u{85}", list => ["x", "y"], word => "ΌΔΟΣ ÉTÉ" };
        let environment = environment();
        Template::new(&environment, template)?.render(&row)
    }

    #[test]
    fn python_s_methods() {
        for (template, expected) in [
            ("{{ text.strip() }}|", "a b|"),
            ("{{ text.lstrip() }}|{{ text.rstrip() }}", "a b\u{85}||\u{1c} a b".replace("||", "|").as_str()),
            ("{{ list.index('y') }}\n", "1\n"),
            ("{{ word.capitalize() }}", "Όδος été"),
            ("{{ 'a#b#c'.split('#')[-1] }}", "c"),
            ("{{ gone if gone is defined else list[0] }}", "x"),
            ("<b>{{ '<&' }}", "<b><&"),
        ] {
            assert_eq!(render(template).as_deref(), Ok(expected), "{template}");
        }
        assert_eq!((capitalize("ßA").as_str(), capitalize("").as_str(), capitalize("ΣΑΣ")), ("Ssa", "", "Σας".into()));
    }

    #[test]
    fn errors_name_what_is_missing() {
        assert_eq!(render("{{ gone }}").unwrap_err(), "no `gone`; the row has text, list, word");
        let error = render("{{ list.index('z') }}").unwrap_err();
        assert!(error.contains(r#""z" is not in the list ["x", "y"]"#), "{error}");
        assert!(render("{{ list.index('z') ").unwrap_err().contains("syntax error"));
        assert!(render("{{ list[7].strip() }}").unwrap_err().contains("undefined"));
    }

    #[test]
    fn hellaswag_s_texts() {
        let text = " How to [x] pay [title] Go. [substeps] Now  \t";
        assert_eq!(hellaswag_clean(text), "How to pay. Go. Now");
        assert_eq!(hellaswag_clean("a [x\ny]   b"), "a [x\ny]  b");
    }
}
