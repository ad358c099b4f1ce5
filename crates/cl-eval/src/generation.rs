use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::metrics::{edit, exact, first_char, gsm8k, rouge, sari};
use crate::{GenerateRequest, Request, Response, Task};

/// A prompt and what should follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What the model is shown.
    pub prompt: String,
    /// What it should write.
    pub reference: String,
    /// What SARI compares the answer with, when that is not the prompt.
    pub source: Option<String>,
}

/// How a written answer is scored. Each gives one or more scores by name; the first named here is the main one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
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

/// A task whose answers are written.
pub struct GenerationTask {
    /// Name, as in tables.
    pub name: String,
    /// How answers are scored.
    pub metric: Metric,
    /// The documents.
    pub documents: Vec<Document>,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
}

impl Metric {
    /// Scores by name, each in `[0, 1]`.
    pub fn scores(self, document: &Document, answer: &str) -> BTreeMap<String, f64> {
        let reference = &document.reference;
        let scores = match self {
            Metric::FirstChar => vec![
                ("first_char", first_char::first_char(answer, reference)),
                ("exact_match", exact::exact_match(answer, reference)),
            ],
            Metric::ExactMatch => vec![("exact_match", exact::exact_match(answer, reference))],
            Metric::RougeL => {
                let score = rouge::rouge_l(answer, reference);
                vec![
                    ("rouge_l", score.f),
                    ("rouge_l_f_beta", score.f_beta),
                    ("rouge_l_swapped", rouge::rouge_l(reference, answer).f),
                ]
            }
            Metric::Sari => {
                vec![("sari", sari::sari(document.source.as_ref().unwrap_or(&document.prompt), answer, reference))]
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

    /// Name of the score that stands for the metric.
    pub fn main(self) -> &'static str {
        match self {
            Metric::FirstChar => "first_char",
            Metric::ExactMatch => "exact_match",
            Metric::RougeL => "rouge_l",
            Metric::Sari => "sari",
            Metric::EditSimilarity => "edit_similarity",
            Metric::Gsm8k | Metric::Gsm8kCot => "flexible_extract",
        }
    }
}

impl Task for GenerationTask {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.documents.len()
    }

    fn request(&self, document: usize) -> Request {
        Request::Generate(GenerateRequest {
            prompt: self.documents[document].prompt.clone(),
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
        })
    }

    fn score(&self, document: usize, response: &Response) -> BTreeMap<String, f64> {
        let answer = match response {
            Response::Text(text) => text.as_str(),
            Response::Loglikelihoods(_) => "",
        };
        self.metric.scores(&self.documents[document], answer)
    }

    fn main_metric(&self) -> &str {
        self.metric.main()
    }
}
