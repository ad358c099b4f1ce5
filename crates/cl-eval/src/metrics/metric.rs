use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::target::Target;
use super::{choice, edit, exact, first_char, gsm8k, rouge, sari};
use crate::request::Response;

/// How answers are scored. Each metric computes one or more named scores in `[0, 1]`; the first listed here is the main
/// score, which represents the task in tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// `acc`: the correct choice has the highest log-likelihood. `acc_norm`: the correct choice has the highest
    /// log-likelihood divided by its number of characters (code points, without the leading space). The first of equal
    /// values wins, as in lm-eval; NaN never wins. If several choices are correct, any of them may win.
    Acc,
    /// The scores of `acc`, with `acc_norm` as the main score, as is usual for ARC, HellaSwag, OpenBookQA and PIQA. For
    /// choices of equal length, such as letters, the two are the same.
    AccNorm,
    /// `probability_mass`: the share of the correct choices in the sum of all choices' probabilities, as in TruthfulQA's
    /// MC2.
    ProbabilityMass,
    /// `greedy_match`: greedy decoding would produce the continuation, i.e. each of its tokens is the most likely one; 0
    /// or 1. Scores of a task also contain `perplexity`, exp(−mean log-likelihood of the continuations), as in LAMBADA.
    GreedyMatch,
    /// `first_char`: the first character of the stripped answer equals that of the reference, as the paper scores
    /// C-STANCE, FOMC and ScienceQA. `exact_match`: the whole strings are equal, as TRACE scores C-STANCE and FOMC (an
    /// answer limited to a few tokens cannot match a long reference such as ScienceQA's).
    FirstChar,
    /// `exact_match`: the stripped answer equals the stripped reference; for [`Target::Answers`], the scores of
    /// [`ExactMatch::scores`](super::ExactMatch::scores).
    ExactMatch,
    /// `rouge_l`: F-score of the `rouge` package. `rouge_l_f_beta`: F-score of its older releases. `rouge_l_swapped`:
    /// F-score with answer and reference swapped, as in the paper's and TRACE's scripts (which only affects ties
    /// between equally long common subsequences).
    RougeL,
    /// The scores of `rouge_l`, with `rouge_l_swapped` as the main score, as in the paper.
    RougeLSwapped,
    /// `sari`: SARI / 100, relative to the prompt and the reference.
    Sari,
    /// `edit_similarity`: `fuzz.ratio` / 100 with python-Levenshtein, after Py150's masks are replaced;
    /// `edit_similarity_difflib`: the same with Python's difflib.
    EditSimilarity,
    /// `flexible_extract`: the last number of the answer; `strict_match`: the number after `#### `.
    Gsm8k,
    /// `flexible_extract`; `strict_match`: the number after `The answer is `.
    Gsm8kCot,
}

impl Metric {
    /// Returns the scores of a document by name, each in `[0, 1]`; the names are the same for every answer and for every
    /// target of a task. An answer of the wrong kind counts as empty.
    pub fn scores(self, target: &Target, response: &Response) -> BTreeMap<String, f64> {
        let answer = match response {
            Response::Text(text) => text.as_str(),
            Response::Loglikelihoods(_) | Response::Continuation(_) => "",
        };
        let reference = match target {
            Target::Reference { reference, .. } => reference.as_str(),
            Target::Answers { answers, .. } => answers.first().map_or("", String::as_str),
            Target::Choice { .. } | Target::Continuation { .. } => "",
        };
        if let (Metric::ExactMatch, Target::Answers { answers, exact_match }) = (self, target) {
            return exact_match.scores(answer, answers);
        }
        let scores = match self {
            Metric::Acc | Metric::AccNorm => {
                let (acc, acc_norm) = choice::accuracies(target, response);
                vec![("acc", acc), ("acc_norm", acc_norm)]
            }
            Metric::ProbabilityMass => vec![("probability_mass", choice::probability_mass(target, response))],
            Metric::GreedyMatch => {
                let greedy = matches!(response, Response::Continuation(answer) if answer.greedy);
                vec![("greedy_match", f64::from(u8::from(greedy)))]
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

    /// Whether the metric is for multiple choice.
    pub fn is_for_choices(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm | Metric::ProbabilityMass)
    }

    /// Whether the metric is for generated texts.
    pub fn is_for_texts(self) -> bool {
        !self.is_for_choices() && self != Metric::GreedyMatch
    }

    /// Returns what a target is missing to be scored by this metric; `None` if it can be scored.
    pub fn lacks(self, target: &Target) -> Option<&'static str> {
        match (self, target) {
            (Metric::GreedyMatch, Target::Continuation { .. }) => None,
            (Metric::GreedyMatch, _) => Some("it has no continuation"),
            (choices, Target::Choice { .. }) if choices.is_for_choices() => None,
            (choices, _) if choices.is_for_choices() => Some("it has no choices"),
            (_, Target::Choice { .. }) => Some("it has choices and no written reference"),
            (_, Target::Continuation { .. }) => Some("it has a continuation and no written reference"),
            (Metric::Sari, Target::Reference { source: None, .. } | Target::Answers { .. }) => {
                Some("its references come without a source")
            }
            (_, Target::Reference { .. } | Target::Answers { .. }) => None,
        }
    }

    /// Returns the name of the main score of a target's task.
    pub fn main_of(self, target: &Target) -> String {
        match (self, target) {
            (Metric::ExactMatch, Target::Answers { exact_match, .. }) => exact_match.main(),
            _ => self.main().to_owned(),
        }
    }

    /// Returns the name of the main score, without that of a filter.
    pub fn main(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::ProbabilityMass => "probability_mass",
            Metric::GreedyMatch => "greedy_match",
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
