use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::target::Target;
use super::{choice, edit, exact, first_char, gsm8k, rouge, sari};
use crate::request::Response;

/// How an answer is scored. Each gives one or more scores by name, all in `[0, 1]`; the first named here is the main one,
/// which stands for the task in tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// `acc`: the largest sum of log-probabilities is the right choice's. `acc_norm`: the largest sum divided by the choice's
    /// number of characters (code points, without the space in front). The first one wins among equals, as in lm-eval; a sum
    /// that is not a number never wins.
    Acc,
    /// `acc_norm`, with `acc` beside it: what lm-eval tables for ARC, HellaSwag, OpenBookQA and PIQA. With choices of one
    /// length, such as letters, the two are the same.
    AccNorm,
    /// `first_char`: the stripped answer's first character against the reference's, as the paper scores C-STANCE, FOMC and
    /// ScienceQA. `exact_match` beside it: whole strings, as TRACE scores C-STANCE and FOMC (an answer cut after a few
    /// tokens cannot match a long reference such as ScienceQA's).
    FirstChar,
    /// `exact_match`: stripped answer equal to the stripped reference.
    ExactMatch,
    /// `rouge_l`: F of the `rouge` package. Beside it `rouge_l_f_beta`, the older releases' F, and `rouge_l_swapped`, the F
    /// when answer and reference change places, as in the paper's and TRACE's scripts (only ties between equally long common
    /// subsequences differ).
    RougeL,
    /// The scores of `rouge_l`, with `rouge_l_swapped` standing for the task: the paper's own number.
    RougeLSwapped,
    /// `sari`: SARI / 100 against the prompt and the reference.
    Sari,
    /// `edit_similarity`: `fuzz.ratio` / 100 with python-Levenshtein, after Py150's clean-up; `edit_similarity_difflib`:
    /// without.
    EditSimilarity,
    /// `flexible_extract`: the last number of the answer; `strict_match`: the number after `#### `.
    Gsm8k,
    /// `flexible_extract`; `strict_match`: the number after `The answer is `.
    Gsm8kCot,
}

impl Metric {
    /// Scores by name, each in `[0, 1]`: the same names for every target and answer. An answer of another kind than the
    /// target wants counts as empty.
    pub fn scores(self, target: &Target, response: &Response) -> BTreeMap<String, f64> {
        let answer = match response {
            Response::Text(text) => text.as_str(),
            Response::Loglikelihoods(_) => "",
        };
        let reference = match target {
            Target::Reference { reference, .. } => reference.as_str(),
            Target::Choice { .. } => "",
        };
        let scores = match self {
            Metric::Acc | Metric::AccNorm => {
                let (acc, acc_norm) = choice::accuracies(target, response);
                vec![("acc", acc), ("acc_norm", acc_norm)]
            }
            Metric::FirstChar => vec![
                ("first_char", first_char::first_char(answer, reference)),
                ("exact_match", exact::exact_match(answer, reference)),
            ],
            Metric::ExactMatch => vec![("exact_match", exact::exact_match(answer, reference))],
            Metric::RougeL | Metric::RougeLSwapped => {
                let score = rouge::rouge_l(answer, reference);
                vec![
                    ("rouge_l", score.f),
                    ("rouge_l_f_beta", score.f_beta),
                    ("rouge_l_swapped", rouge::rouge_l(reference, answer).f),
                ]
            }
            Metric::Sari => {
                let source = match target {
                    Target::Reference { source: Some(source), .. } => source.as_str(),
                    _ => "",
                };
                vec![("sari", sari::sari(source, answer, reference))]
            }
            Metric::EditSimilarity => {
                let (a, b) = (edit::clean_py150(answer), edit::clean_py150(reference));
                vec![
                    ("edit_similarity", edit::fuzz_ratio(&a, &b) / 100.0),
                    ("edit_similarity_difflib", edit::fuzz_ratio_difflib(&a, &b) / 100.0),
                ]
            }
            Metric::Gsm8k => vec![
                ("flexible_extract", gsm8k::exact_match(gsm8k::flexible_extract(answer), reference)),
                ("strict_match", gsm8k::exact_match(gsm8k::strict_match(answer), reference)),
            ],
            Metric::Gsm8kCot => vec![
                ("flexible_extract", gsm8k::exact_match(gsm8k::flexible_extract(answer), reference)),
                ("strict_match", gsm8k::exact_match(gsm8k::strict_match_cot(answer), reference)),
            ],
        };
        scores.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// What a target lacks to be scored by this metric; `None` when nothing.
    pub fn lacks(self, target: &Target) -> Option<&'static str> {
        match (self, target) {
            (Metric::Acc | Metric::AccNorm, Target::Reference { .. }) => Some("it has no choices"),
            (Metric::Acc | Metric::AccNorm, Target::Choice { .. }) => None,
            (_, Target::Choice { .. }) => Some("it has choices and no written reference"),
            (Metric::Sari, Target::Reference { source: None, .. }) => Some("its references come without a source"),
            (_, Target::Reference { .. }) => None,
        }
    }

    /// Name of the score that stands for the metric.
    pub fn main(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::FirstChar => "first_char",
            Metric::ExactMatch => "exact_match",
            Metric::RougeL => "rouge_l",
            Metric::RougeLSwapped => "rouge_l_swapped",
            Metric::Sari => "sari",
            Metric::EditSimilarity => "edit_similarity",
            Metric::Gsm8k | Metric::Gsm8kCot => "flexible_extract",
        }
    }
}
