//! Extraction and comparison of numbers in solutions, as in lm-eval's `gsm8k` and `gsm8k_cot`.
//!
//! Pitfalls:
//! - [`flexible_extract`] takes the *last* match of a pattern that allows `$`, commas and dots anywhere: "18." is
//!   extracted with its dot, and "..." is a match, too. The comparison removes a single final dot.
//! - [`strict_match`] takes the *first* number after `#### `; [`strict_match_cot`] the first after `The answer is `.
//!   The final dot in the pattern of the latter matches any character, so an answer that ends right after the number
//!   loses the number's last digit.
//! - Both sides of the comparison are normalized in the same way, so a reference may be the whole solution.
//!
//! Source: lm-evaluation-harness, `gsm8k.yaml` and `gsm8k-cot.yaml` (version 3.0).

use std::sync::LazyLock;

use regex::Regex;

use super::python_strip;

static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
static STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (-?[0-9.,]+)"));
static STRICT_COT: LazyLock<Regex> = LazyLock::new(|| pattern(r"The answer is (-?[0-9.,]+)."));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern")
}

/// Result if an answer contains no number.
pub const INVALID: &str = "[invalid]";

/// Returns the last number-like part of the answer.
///
/// ```
/// use cl_eval::metrics::gsm8k::flexible_extract;
/// assert_eq!(flexible_extract("so 6*180 = $1,080. So 12"), "12");
/// assert_eq!(flexible_extract("The answer is: 18."), "18.");
/// assert_eq!(flexible_extract("none"), "[invalid]");
/// ```
pub fn flexible_extract(answer: &str) -> &str {
    FLEXIBLE.find_iter(answer).last().map_or(INVALID, |m| m.as_str())
}

/// Returns the number after the first `#### `.
pub fn strict_match(answer: &str) -> &str {
    first_group(&STRICT, answer)
}

/// Returns the number after the first `The answer is `.
pub fn strict_match_cot(answer: &str) -> &str {
    first_group(&STRICT_COT, answer)
}

fn first_group<'t>(pattern: &Regex, answer: &'t str) -> &'t str {
    pattern.captures(answer).and_then(|c| c.get(1)).map_or(INVALID, |m| m.as_str())
}

/// Returns the stripped text after the last `####` of a solution: the reference of `gsm8k_cot`.
pub fn final_answer(solution: &str) -> &str {
    python_strip(solution.rsplit("####").next().unwrap_or(solution))
}

/// Returns 1 if both are equal, ignoring commas, dollar signs, everything up to the last `#### `, a final dot, and
/// case, as in lm-eval; else 0.
pub fn exact_match(extracted: &str, reference: &str) -> f64 {
    f64::from(u8::from(normal(extracted) == normal(reference)))
}

fn normal(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rfind("#### ").map_or(text.as_str(), |at| &text[at + "#### ".len()..]);
    // Python's `$` also matches before a final line break, which is kept.
    let (body, line_break) = text.strip_suffix('\n').map_or((text, ""), |body| (body, "\n"));
    let body = body.strip_suffix('.').unwrap_or(body);
    format!("{body}{line_break}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let reference = "She sold 6*180 = $1080.\n#### 1,080";
        assert_eq!(exact_match(flexible_extract("it is $1,080."), reference), 1.0);
        assert_eq!(exact_match(flexible_extract("The answer is: 18."), "#### 18"), 1.0);
        assert_eq!(exact_match(strict_match("… #### 1080\n#### 3"), reference), 1.0);
        assert_eq!(exact_match(strict_match_cot("The answer is 1080."), reference), 1.0);
        assert_eq!(exact_match(strict_match("1080"), reference), 0.0);
        assert_eq!(exact_match(flexible_extract("-5"), "-5"), 1.0);
        assert_eq!(final_answer("a #### 1 #### \n 2 "), "2");
    }

    #[test]
    fn the_two_strict_patterns_are_not_each_other_s() {
        assert_eq!(strict_match("The answer is 7."), INVALID);
        assert_eq!(strict_match_cot("#### 7"), INVALID);
        // re.findall(r"The answer is (\-?[0-9\.\,]+).", "The answer is 18") -> ['1']
        assert_eq!(strict_match_cot("The answer is 18"), "1");
        assert_eq!(strict_match_cot("The answer is 18.\n"), "18");
        assert_eq!(strict_match_cot("The answer is 5"), INVALID);
    }

    #[test]
    fn one_final_dot_is_ignored() {
        for (a, b, equal) in
            [("5.", "5", 1.0), ("5..", "5", 0.0), ("5.\n", "5\n", 1.0), ("5.\n", "5", 0.0), ("A", "a", 1.0)]
        {
            assert_eq!(exact_match(a, b), equal, "{a:?} {b:?}");
        }
    }
}
