//! Accuracy of the first character: the paper's score for C-STANCE, FOMC and ScienceQA.

use super::python_strip;

/// Returns 1 if the first character of the stripped answer is the first of the reference (which is not stripped), else
/// 0; an empty answer is wrong. TRACE itself compares whole strings for C-STANCE and FOMC; see [`super::exact`].
///
/// ```
/// use cl_eval::metrics::first_char::first_char;
/// assert_eq!(first_char("  B. hawkish", "B"), 1.0);
/// assert_eq!(first_char("", "B"), 0.0);
/// ```
pub fn first_char(answer: &str, reference: &str) -> f64 {
    let first = python_strip(answer).chars().next();
    f64::from(u8::from(first.is_some() && first == reference.chars().next()))
}
