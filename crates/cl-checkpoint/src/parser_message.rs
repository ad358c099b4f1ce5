//! Messages of serde's parsers, in the terms of the files instead of Rust's.

/// Maximum length of names and values quoted from a file, in characters.
const LONGEST: usize = 100;

/// Rewrites a message of serde's parsers for TOML and JSON: Rust's types are replaced by those of the file, and for an
/// unknown key or value the most similar valid one is suggested. Other lines of the message are kept.
///
/// ```
/// use cl_checkpoint::files::in_plain_words;
/// let message = in_plain_words("invalid type: string \"1e-3\", expected f64");
/// assert_eq!(message, "expected a number, got the text \"1e-3\"");
/// let message = in_plain_words("unknown field `epoch`, expected one of `epochs`, `max_steps`");
/// assert_eq!(message, "unknown key `epoch` (did you mean `epochs`?), expected one of `epochs`, `max_steps`");
/// ```
pub fn in_plain_words(message: &str) -> String {
    message.trim_end().lines().map(of_line).collect::<Vec<_>>().join("\n")
}

/// Rewrites a message of the JSON parser [in plain words](in_plain_words), keeping only the column of its position, for
/// messages that name the line of the file themselves.
///
/// ```
/// let message = cl_checkpoint::files::of_json_line("EOF while parsing a string at line 1 column 20");
/// assert_eq!(message, "EOF while parsing a string at column 20");
/// ```
pub fn of_json_line(message: &str) -> String {
    let plain = in_plain_words(message);
    let (text, place) = split_place(&plain);
    place.find("column ").map_or_else(|| text.to_owned(), |at| format!("{text} at {}", &place[at..]))
}

/// Rewrites a message of the YAML parser [in plain words](in_plain_words), without its advice for programmers and its
/// excerpt of the text.
///
/// ```
/// let message = cl_checkpoint::files::of_yaml("error: line 2 column 1: missing field `models`\n --> the text");
/// assert_eq!(message, "line 2 column 1: the key `models` is missing");
/// ```
pub fn of_yaml(message: &str) -> String {
    const LONGEST: usize = 500;
    let first = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
    let plain = first
        .replace(", set DuplicateKeyPolicy in Options if acceptable", "; keep one of the two")
        .replace("recursive references require weak recursion types", "an anchor holds itself; write the value out");
    in_plain_words(&plain.chars().take(LONGEST).collect::<String>())
}

/// Whether a line lists valid keys or values, and quotes at most [`LONGEST`] characters of the file.
pub(crate) fn lists_choices(line: &str) -> bool {
    line.starts_with("unknown key `") || line.starts_with("unknown value `")
}

fn of_line(line: &str) -> String {
    // The YAML parser writes the position first.
    if let Some((place, rest)) = line.split_once(": ").filter(|(place, _)| is_place(place)) {
        return format!("{place}: {}", of_line(rest));
    }
    let (line, place) = split_place(line);
    let plain = unknown(line, "unknown field `", "unknown key `")
        .or_else(|| unknown(line, "unknown variant `", "unknown value `"))
        .or_else(|| mismatch(line, place))
        .or_else(|| Some(format!("the key {} is missing", line.strip_prefix("missing field ")?)))
        .unwrap_or_else(|| match line {
            "wanted string or table" => "expected text or a table".to_owned(),
            line if line.starts_with("wanted exactly 1 element") => "expected a table with exactly one key".to_owned(),
            line => line.to_owned(),
        });
    plain + place
}

/// Whether this is a position such as `line 1 column 2`.
fn is_place(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let numbers = text.strip_prefix("line ").and_then(|rest| rest.split_once(" column "));
    numbers.is_some_and(|(line, column)| digits(line) && digits(column))
}

/// Splits off a position such as ` at line 1 column 2`, which only the JSON parser appends.
fn split_place(line: &str) -> (&str, &str) {
    line.rfind(" at line ").filter(|&at| line[at..].contains(" column ")).map_or((line, ""), |at| line.split_at(at))
}

/// Rewrites ``unknown field `x`, expected one of `y`, `z` ``, replacing its beginning and adding the most similar
/// choice.
fn unknown(line: &str, serde: &str, plain: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix(serde)?.split_once('`')?;
    // The choices are written `x`, `y` by serde, or x, y by the YAML parser.
    let list = rest.trim_start_matches(", expected ").trim_start_matches("one of ");
    let choices: Vec<&str> =
        if list.contains('`') { list.split('`').skip(1).step_by(2).collect() } else { list.split(", ").collect() };
    let hint = similar(name, &choices).map_or_else(String::new, |choice| format!(" (did you mean `{choice}`?)"));
    Some(format!("{plain}{}`{hint}{rest}", cut(name)))
}

/// Rewrites `invalid type: map, expected f64`.
fn mismatch(line: &str, place: &str) -> Option<String> {
    let rest = line.strip_prefix("invalid type: ").or_else(|| line.strip_prefix("invalid value: "))?;
    let (found, expected) = rest.rsplit_once(", expected ")?;
    let json = !place.is_empty();
    Some(format!("expected {}, got {}", expected_type(expected, json), found_value(found, json)))
}

fn expected_type(name: &str, json: bool) -> &str {
    match name {
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "an integer, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "an integer",
        "a boolean" => "true or false",
        "a string" | "string" => "text",
        "path string" => "a path",
        "a sequence" | "sequence" => "a list",
        _ if name.starts_with("a nonzero ") => "an integer, at least 1",
        _ if name == "a map" || name == "map" || name.starts_with("struct ") => table(json),
        _ => name,
    }
}

fn found_value(found: &str, json: bool) -> String {
    let quoted = |kind: &str| found.strip_prefix(kind)?.strip_suffix('`');
    match found {
        "map" => table(json).to_owned(),
        "sequence" => "a list".to_owned(),
        _ => match found.strip_prefix("string ") {
            Some(text) => format!("the text {}", cut(text)),
            None => {
                let value = quoted("integer `").or_else(|| quoted("floating point `")).or_else(|| quoted("boolean `"));
                cut(value.unwrap_or(found))
            }
        },
    }
}

fn table(json: bool) -> &'static str {
    if json { "an object" } else { "a table" }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}

/// Returns the choice with the smallest edit distance to `name`, if at most a third of its letters differ.
pub fn similar<'a>(name: &str, choices: &[&'a str]) -> Option<&'a str> {
    let name: String = name.chars().take(LONGEST).collect();
    let most = (name.chars().count() / 3).max(1);
    let distances = choices.iter().map(|choice| (strsim::osa_distance(&name, choice), *choice));
    distances.filter(|(distance, _)| *distance <= most).min_by_key(|(distance, _)| *distance).map(|(_, choice)| choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_rust_become_those_of_the_file() {
        for (message, plain) in [
            ("invalid type: floating point `1.5`, expected u64", "expected an integer, 0 or more, got 1.5"),
            ("invalid value: integer `-1`, expected usize", "expected an integer, 0 or more, got -1"),
            ("invalid value: integer `0`, expected a nonzero u32", "expected an integer, at least 1, got 0"),
            (
                "invalid type: string \"a, expected b\", expected struct DataConfig",
                "expected a table, got the text \"a, expected b\"",
            ),
            ("invalid type: map, expected path string", "expected a path, got a table"),
            (
                "invalid type: map, expected usize at line 1 column 49",
                "expected an integer, 0 or more, got an object at line 1 column 49",
            ),
            ("missing field `model`", "the key `model` is missing"),
            ("wanted exactly 1 element, more than 1 element", "expected a table with exactly one key"),
            (
                "line 2 column 5: unknown field `modle`, expected one of model, weight",
                "line 2 column 5: unknown key `modle` (did you mean `model`?), expected one of model, weight",
            ),
            ("expected value at line 1 column 1", "expected value at line 1 column 1"),
        ] {
            assert_eq!(in_plain_words(message), plain);
        }
    }

    #[test]
    fn only_similar_choices_are_suggested_and_long_names_are_cut() {
        let of = |name: &str| in_plain_words(&format!("unknown variant `{name}`, expected `redrawn` or `fixed`"));
        assert_eq!(of("fixd"), "unknown value `fixd` (did you mean `fixed`?), expected `redrawn` or `fixed`");
        assert_eq!(of("fiexd"), "unknown value `fiexd` (did you mean `fixed`?), expected `redrawn` or `fixed`");
        assert_eq!(of("none"), "unknown value `none`, expected `redrawn` or `fixed`");
        assert!(of(&"x".repeat(1_000_000)).len() < 200);
    }

    #[test]
    fn the_parsers_write_what_is_read_here() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Config {
            #[allow(dead_code)]
            epochs: u64,
        }
        let message = |text: &str| in_plain_words(&serde_json::from_str::<Config>(text).unwrap_err().to_string());
        assert_eq!(
            message(r#"{"epoch": 1}"#),
            "unknown key `epoch` (did you mean `epochs`?), expected `epochs` at line 1 column 8"
        );
        assert_eq!(
            message(r#"{"epochs": "1"}"#),
            "expected an integer, 0 or more, got the text \"1\" at line 1 column 14"
        );
        assert_eq!(message("{}"), "the key `epochs` is missing at line 1 column 2");
    }
}
