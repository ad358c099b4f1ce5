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

/// How a written answer is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// First character of the stripped answer against the reference's.
    FirstChar,
    /// Stripped answer equal to the stripped reference.
    ExactMatch,
    /// ROUGE-L of the `rouge` package.
    RougeL,
    /// SARI / 100.
    Sari,
    /// `fuzz.ratio` / 100 after Py150's clean-up.
    EditSimilarity,
    /// The last number of the answer.
    Gsm8k,
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
    /// Scores by name; the first is the main one.
    fn scores(self, document: &Document, answer: &str) -> Vec<(&'static str, f64)> {
        let reference = &document.reference;
        match self {
            Metric::FirstChar => vec![
                ("first_char", first_char::first_char(answer, reference)),
                ("exact_match", exact::exact_match(answer, reference)),
            ],
            Metric::ExactMatch => vec![("exact_match", exact::exact_match(answer, reference))],
            Metric::RougeL => {
                let score = rouge::rouge_l(answer, reference);
                vec![("rouge_l", score.f), ("rouge_l_f_beta", score.f_beta)]
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
                ("flexible_extract", gsm8k::exact_match(&gsm8k::flexible_extract(answer), reference)),
                ("strict_match", gsm8k::exact_match(&gsm8k::strict_match(answer), reference)),
            ],
        }
    }

    fn main(self) -> &'static str {
        match self {
            Metric::FirstChar => "first_char",
            Metric::ExactMatch => "exact_match",
            Metric::RougeL => "rouge_l",
            Metric::Sari => "sari",
            Metric::EditSimilarity => "edit_similarity",
            Metric::Gsm8k => "flexible_extract",
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
        let scores = self.metric.scores(&self.documents[document], answer);
        scores.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn main_metric(&self) -> &str {
        self.metric.main()
    }
}
