//! Numbers out of written solutions, as lm-eval's GSM8K tasks extract and compare them.

use std::sync::LazyLock;

use regex::Regex;

static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
static STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (-?[0-9.,]+)"));
static STRICT_COT: LazyLock<Regex> = LazyLock::new(|| pattern(r"The answer is (-?[0-9.,]+)\."));
static UP_TO_MARK: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?s).*#### "));
static FINAL_DOT: LazyLock<Regex> = LazyLock::new(|| pattern(r"\.\n?$"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern")
}

/// What stands for an answer in which nothing was found.
pub const INVALID: &str = "[invalid]";

/// The last number-like piece of the answer.
///
/// ```
/// use cl_eval::metrics::gsm8k::flexible_extract;
/// assert_eq!(flexible_extract("so 6*180 = $1,080. So 12"), "12");
/// assert_eq!(flexible_extract("The answer is: 18."), "18.");
/// assert_eq!(flexible_extract("none"), "[invalid]");
/// ```
pub fn flexible_extract(answer: &str) -> String {
    FLEXIBLE.find_iter(answer).last().map_or(INVALID, |m| m.as_str()).trim().to_owned()
}

/// The number after the first `#### `, or else after the first `The answer is ` (the chain-of-thought task's pattern).
pub fn strict_match(answer: &str) -> String {
    let capture = STRICT.captures(answer).or_else(|| STRICT_COT.captures(answer));
    capture.map_or(INVALID.to_owned(), |c| c[1].trim().to_owned())
}

/// 1 when both are equal after what lm-eval ignores: commas, dollar signs, everything up to the last `#### `, a final dot,
/// and case.
pub fn exact_match(extracted: &str, reference: &str) -> f64 {
    f64::from(u8::from(normal(extracted) == normal(reference)))
}

fn normal(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = UP_TO_MARK.replace_all(&text, "");
    FINAL_DOT.replace_all(&text, "").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let reference = "She sold 6*180 = $1080.\n#### 1,080";
        assert_eq!(exact_match(&flexible_extract("it is $1,080."), reference), 1.0);
        assert_eq!(exact_match(&flexible_extract("The answer is: 18."), "#### 18"), 1.0);
        assert_eq!(exact_match(&strict_match("… #### 1080\n#### 3"), reference), 1.0);
        assert_eq!(exact_match(&strict_match("The answer is 1080."), reference), 1.0);
        assert_eq!(exact_match(&strict_match("1080"), reference), 0.0);
        assert_eq!(exact_match(&flexible_extract("-5"), "-5"), 1.0);
    }
}
