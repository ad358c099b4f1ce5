//! Exact match of whole strings, and lm-eval's `exact_match` with its options and filters.
//!
//! Pitfall: lm-eval does not remove white space around the two texts; [`exact_match`], the metric of task descriptions
//! without [`ExactMatch`], does.
//!
//! Source: lm-evaluation-harness, `exact_match` in `lm_eval/api/metrics.py` (0.4.13).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::filter::FilterPipeline;
use super::python_regex::PythonRegex;
use super::python_strip;

/// Returns 1 if answer and reference are equal after white space at both ends is removed, else 0.
pub fn exact_match(answer: &str, reference: &str) -> f64 {
    f64::from(u8::from(python_strip(answer) == python_strip(reference)))
}

/// lm-eval's `exact_match`: filters of answers, and what is removed from both texts before they are compared, in the
/// order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExactMatch {
    /// Each pipeline extracts an answer and gives a score of its own. Without any, answers are compared as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filter_list: Vec<FilterPipeline>,
    /// Patterns whose matches are removed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub regexes_to_ignore: Vec<PythonRegex>,
    /// Whether texts are converted to lower case.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_case: bool,
    /// Whether ASCII punctuation is removed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_punctuation: bool,
    /// Whether ASCII digits are removed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_numbers: bool,
}

impl ExactMatch {
    /// Returns the scores of an answer by name: 1 if it equals one of the right answers, else 0. The name is
    /// `exact_match`, or `exact_match,NAME` for each pipeline of filters, as in lm-eval's results.
    ///
    /// ```
    /// let loose = cl_eval::metrics::ExactMatch { ignore_case: true, ..Default::default() };
    /// assert_eq!(loose.scores("paris", &["Lutetia".to_owned(), "Paris".to_owned()])["exact_match"], 1.0);
    /// ```
    pub fn scores(&self, answer: &str, right: &[String]) -> BTreeMap<String, f64> {
        let right: Vec<String> = right.iter().map(|text| self.normal(text)).collect();
        let score = |answer: &str| f64::from(u8::from(right.contains(&self.normal(answer))));
        if self.filter_list.is_empty() {
            return [(self.main(), score(answer))].into();
        }
        self.filter_list.iter().map(|pipeline| (name(pipeline), score(&pipeline.apply(answer)))).collect()
    }

    /// Returns the name of the main score: that of the first pipeline.
    pub fn main(&self) -> String {
        self.filter_list.first().map_or_else(|| "exact_match".to_owned(), name)
    }

    fn normal(&self, text: &str) -> String {
        let mut text = self.regexes_to_ignore.iter().fold(text.to_owned(), |text, pattern| pattern.remove(&text));
        if self.ignore_case {
            text = text.to_lowercase();
        }
        let ignored = |c: char| {
            (self.ignore_punctuation && c.is_ascii_punctuation()) || (self.ignore_numbers && c.is_ascii_digit())
        };
        text.retain(|c| !ignored(c));
        text
    }
}

fn name(pipeline: &FilterPipeline) -> String {
    match pipeline.name.as_str() {
        "none" => "exact_match".to_owned(),
        name => format!("exact_match,{name}"),
    }
}
