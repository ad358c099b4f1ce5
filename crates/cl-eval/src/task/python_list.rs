//! Lists of texts as Python prints them.

use std::str::Chars;

/// Parses a Python list of string literals, such as `['a', "b's"]`; `None` if the text is anything else.
///
/// lm-eval reads rendered targets with `ast.literal_eval`. Of its literals, these are the ones that are right answers.
pub(super) fn python_list(text: &str) -> Option<Vec<String>> {
    let mut rest = text.strip_prefix('[')?.strip_suffix(']')?.trim_start();
    let mut items = Vec::new();
    while !rest.is_empty() {
        let quote = rest.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let mut characters = rest[1..].chars();
        items.push(literal(&mut characters, quote)?);
        rest = characters.as_str().trim_start();
        match rest.strip_prefix(',') {
            Some(after) => rest = after.trim_start(),
            None if rest.is_empty() => {}
            None => return None,
        }
    }
    Some(items)
}

/// Reads a string literal after its opening quote.
fn literal(rest: &mut Chars<'_>, quote: char) -> Option<String> {
    let mut text = String::new();
    loop {
        match rest.next()? {
            c if c == quote => return Some(text),
            '\n' => return None,
            '\\' => match rest.next()? {
                c @ ('\\' | '\'' | '"') => text.push(c),
                'n' => text.push('\n'),
                'r' => text.push('\r'),
                't' => text.push('\t'),
                'x' => text.push(code_point(rest, 2)?),
                'u' => text.push(code_point(rest, 4)?),
                'U' => text.push(code_point(rest, 8)?),
                _ => return None,
            },
            c => text.push(c),
        }
    }
}

fn code_point(rest: &mut Chars<'_>, digits: usize) -> Option<char> {
    let number: String = rest.by_ref().take(digits).collect();
    let complete = number.len() == digits && number.chars().all(|c| c.is_ascii_hexdigit());
    u32::from_str_radix(&number, 16).ok().filter(|_| complete).and_then(char::from_u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_texts_alone_are_parsed() {
        // ast.literal_eval(text)
        for (text, expected) in [
            (r#"['a', "b's"]"#, Some(vec!["a", "b's"])),
            (r"[ 'a\n\'\\' ,'\xe9\u4e2d\U0001d11e' , ]", Some(vec!["a\n'\\", "é中𝄞"])),
            ("[]", Some(vec![])),
            ("[1, 2]", None),
            ("['a' 'b']", None),
            ("['a'", None),
            ("['a]", None),
            ("[,]", None),
            (r"['\xzz']", None),
            ("('a',)", None),
        ] {
            let expected = expected.map(|items| items.into_iter().map(str::to_owned).collect::<Vec<_>>());
            assert_eq!(python_list(text), expected, "{text}");
        }
    }
}
