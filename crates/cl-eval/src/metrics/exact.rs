//! Exact match of whole strings.

use super::python_strip;

/// Returns 1 if answer and reference are equal after white space at both ends is removed, else 0.
pub fn exact_match(answer: &str, reference: &str) -> f64 {
    f64::from(u8::from(python_strip(answer) == python_strip(reference)))
}
