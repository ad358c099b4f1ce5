//! Regular expressions in the syntax of Python's module `re`.

use std::collections::HashMap;
use std::fmt;
use std::sync::{LazyLock, Mutex, PoisonError};

use fancy_regex::{Captures, Regex};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A regular expression in Python's syntax, including look-around and backreferences.
///
/// Patterns are translated to the syntax of the crate `fancy_regex`: `$` also matches before a final line break, `{`
/// that is not a repetition and `[` in a character class are literal, and `\w`, `\s`, `\Z`, `\<` and `\>` have Python's
/// meaning. Some differences remain: `\b` takes combining marks for parts of words; after an empty match, the search
/// goes on with the next character; a group in a repetition keeps its last match that is not empty; and a search that
/// backtracks more than a million times counts as no match.
///
/// Source: Python's documentation of `re`.
///
/// ```
/// use cl_eval::metrics::PythonRegex;
/// let answer = PythonRegex::new(r"(?<=The answer is )(.*)(?=.)")?;
/// assert_eq!(answer.find_all("The answer is (B)."), ["(B)"]);
/// assert_eq!(PythonRegex::new(r"\.$")?.remove("18.\n"), "18\n");
/// # Ok::<(), String>(())
/// ```
#[derive(Clone)]
pub struct PythonRegex {
    source: String,
    compiled: Regex,
}

impl PythonRegex {
    /// Compiles a pattern. Each is compiled once per process, since every line of a predictions file contains them.
    ///
    /// # Errors
    /// Returns a message if the pattern is invalid.
    pub fn new(source: &str) -> Result<PythonRegex, String> {
        static COMPILED: LazyLock<Mutex<HashMap<String, Regex>>> = LazyLock::new(Mutex::default);
        let mut known = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        let compiled = match known.get(source) {
            Some(compiled) => compiled.clone(),
            None => {
                let compiled = Regex::new(&translated(source));
                let compiled = compiled.map_err(|error| format!("invalid regular expression {source:?}: {error}"))?;
                known.entry(source.to_owned()).or_insert(compiled).clone()
            }
        };
        Ok(PythonRegex { source: source.to_owned(), compiled })
    }

    /// Returns the number of groups.
    pub fn groups(&self) -> usize {
        self.compiled.captures_len() - 1
    }

    /// Returns the text of every match, as Python's `findall`; for a pattern with groups, that of the first group that
    /// is not empty, or an empty text.
    pub fn find_all<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let (mut found, mut from) = (Vec::new(), 0);
        while from <= text.len() {
            let Ok(Some(captures)) = self.compiled.captures_from_pos(text, from) else { break };
            let Some(whole) = captures.get(0) else { break };
            found.push(first_group(&captures));
            // An empty match may follow another match directly, but not another empty match.
            let step = text[whole.end()..].chars().next().map_or(1, char::len_utf8);
            from = if whole.as_str().is_empty() { whole.end() + step } else { whole.end() };
        }
        found
    }

    /// Returns the text without all matches, as Python's `re.sub(pattern, "", text)`.
    pub fn remove(&self, text: &str) -> String {
        self.compiled.try_replacen(text, 0, "").map_or_else(|_| text.to_owned(), |rest| rest.into_owned())
    }
}

fn first_group<'t>(captures: &Captures<'t, str>) -> &'t str {
    if captures.len() == 1 {
        return captures.get(0).map_or("", |whole| whole.as_str());
    }
    let groups = (1..captures.len()).filter_map(|group| captures.get(group));
    groups.map(|group| group.as_str()).find(|text| !text.is_empty()).unwrap_or_default()
}

/// Translates a pattern from Python's syntax to that of `fancy_regex`.
fn translated(pattern: &str) -> String {
    let multiline = has_flag(pattern, 'm');
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern.chars();
    while let Some(c) = rest.next() {
        match c {
            '\\' => escape(&mut out, rest.next(), false),
            '[' => class(&mut out, &mut rest),
            ']' | '}' => out.extend(['\\', c]),
            '{' => repetition(&mut out, &mut rest),
            '$' if !multiline => out.push_str(r"(?=\n?\z)"),
            c => out.push(c),
        }
    }
    out
}

/// Whether a pattern has a group of flags, such as `(?im)`, with this one.
fn has_flag(pattern: &str, flag: char) -> bool {
    pattern.split("(?").skip(1).any(|rest| {
        let flags: String = rest.chars().take_while(char::is_ascii_lowercase).collect();
        flags.contains(flag) && rest[flags.len()..].starts_with([')', ':', '-'])
    })
}

/// Content of the class of letters, numbers and the underscore, Python's `\w`; and of white space, its `\s`.
const WORD: &str = r"\p{L}\p{N}_";
const SPACE: &str = r"\s\x1c-\x1f";

/// Translates the character after a backslash.
fn escape(out: &mut String, escaped: Option<char>, in_class: bool) {
    match escaped {
        Some('w' | 's') if in_class => *out += if escaped == Some('w') { WORD } else { SPACE },
        Some(c @ ('w' | 's')) => out.extend(["[", if c == 'w' { WORD } else { SPACE }, "]"]),
        Some(c @ ('W' | 'S')) => out.extend(["[^", if c == 'W' { WORD } else { SPACE }, "]"]),
        Some('Z') if !in_class => out.push_str(r"\z"),
        Some('b') if in_class => out.push_str(r"\x08"),
        Some(c) if c.is_ascii_alphanumeric() || (c.is_ascii_punctuation() && !matches!(c, '<' | '>')) => {
            out.extend(['\\', c]);
        }
        Some(c) => out.push(c),
        None => out.push('\\'), // an error in both syntaxes
    }
}

/// Translates a character class after its `[`.
fn class(out: &mut String, rest: &mut std::str::Chars<'_>) {
    out.push('[');
    if rest.as_str().starts_with('^') {
        out.extend(rest.next());
    }
    let mut first = true;
    while let Some(c) = rest.next() {
        match c {
            ']' if !first => {
                out.push(']');
                return;
            }
            '\\' => escape(out, rest.next(), true),
            // Rust's classes can be nested and combined.
            ']' | '[' | '&' | '~' => out.extend(['\\', c]),
            '-' if rest.as_str().starts_with('-') => {
                out.push_str(r"-\-");
                rest.next();
            }
            c => out.push(c),
        }
        first = false;
    }
}

/// Translates `{`: the start of a repetition such as `{2}` or `{,3}`, or a literal.
fn repetition(out: &mut String, rest: &mut std::str::Chars<'_>) {
    let inner = rest.as_str().split_once('}').map(|(inner, _)| inner);
    let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    match inner.map(|inner| inner.split_once(',').unwrap_or((inner, inner))) {
        Some(("", "")) if inner == Some(",") => {
            out.push('*');
            *rest = rest.as_str()[2..].chars();
        }
        Some((from, to)) if digits(from) && digits(to) && !(from.is_empty() && to.is_empty()) => {
            let inner = inner.unwrap_or_default();
            *out += if from.is_empty() { "{0" } else { "{" };
            *out += inner;
            out.push('}');
            *rest = rest.as_str()[inner.len() + 1..].chars();
        }
        _ => out.push_str(r"\{"),
    }
}

impl fmt::Debug for PythonRegex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PythonRegex({:?})", self.source)
    }
}

impl PartialEq for PythonRegex {
    fn eq(&self, other: &PythonRegex) -> bool {
        self.source == other.source
    }
}

impl Eq for PythonRegex {}

impl Serialize for PythonRegex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.source.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PythonRegex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PythonRegex, D::Error> {
        PythonRegex::new(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_s_syntax_is_translated() {
        for (pattern, expected) in [
            (r"\.$", r"\.(?=\n?\z)"),
            (r"(?m)x$", "(?m)x$"),
            (r"(?i:x)$", r"(?i:x)(?=\n?\z)"),
            (r"[$0-9.,]{2,}", r"[$0-9.,]{2,}"),
            (r"a{,3}{x}{}b{,}", r"a{0,3}\{x\}\{\}b*"),
            (r"\w[\w\s]\W\S[+--]", r"[\p{L}\p{N}_][\p{L}\p{N}_\s\x1c-\x1f][^\p{L}\p{N}_][^\s\x1c-\x1f][+-\-]"),
            (r"[]a]|[^]&&[~]", r"[\]a]|[^\]\&\&\[\~]"),
            (r"\Z\<\>\é\-\$[\b]", r"\z<>é\-\$[\x08]"),
        ] {
            assert_eq!(translated(pattern), expected, "{pattern}");
        }
    }

    #[test]
    fn invalid_patterns_are_errors() {
        for pattern in ["(", "[a", r"\", "*"] {
            let message = PythonRegex::new(pattern).unwrap_err();
            assert!(message.starts_with("invalid regular expression"), "{message}");
        }
    }
}
