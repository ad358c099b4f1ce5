//! lm-eval's filters: what is extracted from an answer before it is compared.
//!
//! Source: lm-evaluation-harness, `lm_eval/filters` (0.4.13).

use serde::{Deserialize, Serialize};

use super::python_regex::PythonRegex;
use super::python_strip;

/// A named sequence of filters: an entry of lm-eval's `filter_list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterPipeline {
    /// Name of the score, such as `strict-match`.
    pub name: String,
    /// The filters, applied in this order.
    pub filter: Vec<Filter>,
}

/// One of lm-eval's filters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "function", rename_all = "snake_case", deny_unknown_fields)]
pub enum Filter {
    /// Keeps one match of a pattern, without white space at both ends. Of a match with groups, the first group that is
    /// not empty is kept.
    Regex {
        /// The pattern, in Python's syntax.
        #[serde(default = "number_after_marks")]
        regex_pattern: PythonRegex,
        /// Index of the match; negative indices count from the last match, −1.
        #[serde(default)]
        group_select: i64,
        /// The answer if there is no such match, or if all groups of it are empty.
        #[serde(default = "invalid")]
        fallback: String,
    },
    /// Removes white space at both ends.
    RemoveWhitespace,
    /// Converts to lower case.
    Lowercase,
    /// Converts to upper case.
    Uppercase,
    /// Keeps the first of several answers; there is only one here.
    TakeFirst,
}

impl FilterPipeline {
    /// Applies the filters to an answer.
    ///
    /// ```
    /// let number: cl_eval::metrics::FilterPipeline = serde_json::from_str(
    ///     r#"{"name": "last", "filter": [{"function": "regex", "regex_pattern": "[0-9]+", "group_select": -1}]}"#,
    /// )?;
    /// assert_eq!(number.apply("6 times 7 is 42."), "42");
    /// assert_eq!(number.apply("none"), "[invalid]");
    /// # Ok::<(), serde_json::Error>(())
    /// ```
    pub fn apply(&self, answer: &str) -> String {
        self.filter.iter().fold(answer.to_owned(), |answer, filter| filter.apply(&answer))
    }
}

impl Filter {
    fn apply(&self, answer: &str) -> String {
        match self {
            Filter::Regex { regex_pattern, group_select, fallback } => {
                let found = regex_pattern.find_all(answer);
                let index = if *group_select < 0 { found.len() as i64 + group_select } else { *group_select };
                match usize::try_from(index).ok().and_then(|index| found.get(index)) {
                    Some(kept) if kept.is_empty() && regex_pattern.groups() > 1 => python_strip(fallback).to_owned(),
                    Some(kept) => python_strip(kept).to_owned(),
                    None => fallback.clone(),
                }
            }
            Filter::RemoveWhitespace => python_strip(answer).to_owned(),
            Filter::Lowercase => answer.to_lowercase(),
            Filter::Uppercase => answer.to_uppercase(),
            Filter::TakeFirst => answer.to_owned(),
        }
    }
}

fn number_after_marks() -> PythonRegex {
    PythonRegex::new(r"#### (\-?[0-9\.\,]+)").expect("a constant pattern")
}

fn invalid() -> String {
    "[invalid]".to_owned()
}
