use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, LoglikelihoodRequest, Request, Response, Task};

/// A question with choices, one of them right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// What stands before each choice.
    pub query: String,
    /// The choices; each is scored with a space in front.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub gold: usize,
}

/// Questions answered by the likeliest choice.
///
/// `acc`: the largest sum of log-probabilities is the right choice's. `acc_norm`: the largest sum divided by the choice's
/// number of characters (code points, without the space in front). The first one wins among equals, as in lm-eval; a sum that
/// is not a number never wins.
///
/// lm-eval tables `acc_norm` for ARC, HellaSwag, OpenBookQA and PIQA and `acc` for MMLU, CommonsenseQA and WinoGrande. With
/// choices of one length, such as letters, the two are the same.
pub struct MultipleChoice {
    name: String,
    questions: Vec<Question>,
    main_metric: &'static str,
}

impl MultipleChoice {
    /// A task of given questions.
    ///
    /// # Errors
    /// [`Error::NoDocuments`], [`Error::QuestionGold`].
    pub fn new(name: &str, questions: Vec<Question>) -> Result<MultipleChoice, Error> {
        if questions.is_empty() {
            return Err(Error::NoDocuments { name: name.to_owned() });
        }
        if let Some((question, q)) = questions.iter().enumerate().find(|(_, q)| q.gold >= q.choices.len()) {
            let (gold, choices) = (q.gold, q.choices.len());
            return Err(Error::QuestionGold { task: name.to_owned(), question, gold, choices });
        }
        Ok(MultipleChoice { name: name.to_owned(), questions, main_metric: "acc" })
    }

    /// The same questions with `acc_norm` standing for them in tables.
    pub fn by_acc_norm(self) -> MultipleChoice {
        MultipleChoice { main_metric: "acc_norm", ..self }
    }

    /// Reads a JSONL file with a [`Question`] on every line; at most `limit` of them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Line`] and [`Error::Gold`] with the line, [`Error::NoDocuments`].
    pub fn load(path: &Path, limit: Option<usize>) -> Result<MultipleChoice, Error> {
        let mut questions = Vec::new();
        for (line, question) in lines::<Question>(path, r#"{"query": "…", "choices": ["…", "…"], "gold": 0}"#)? {
            let (gold, choices) = (question.gold, question.choices.len());
            if gold >= choices {
                return Err(Error::Gold { path: path.to_owned(), line, gold, choices });
            }
            questions.push(question);
        }
        questions.truncate(limit.unwrap_or(usize::MAX));
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        MultipleChoice::new(&name, questions)
    }
}

/// The lines of a JSONL file that are not blank, with their numbers from 1.
pub(crate) fn lines<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<Vec<(usize, T)>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let parse = |(i, line): (usize, &str)| {
        let value = serde_json::from_str(line);
        value.map(|v| (i + 1, v)).map_err(|source| Error::Line { path: path.to_owned(), line: i + 1, expected, source })
    };
    text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(parse).collect()
}

impl Task for MultipleChoice {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.questions.len()
    }

    fn request(&self, document: usize) -> Request {
        let question = &self.questions[document];
        let ask = |choice: &String| LoglikelihoodRequest {
            context: question.query.clone(),
            continuation: format!(" {choice}"),
        };
        Request::Loglikelihood(question.choices.iter().map(ask).collect())
    }

    fn score(&self, document: usize, response: &Response) -> BTreeMap<String, f64> {
        let question = &self.questions[document];
        let sums = match response {
            Response::Loglikelihoods(sums) if sums.len() == question.choices.len() => sums.as_slice(),
            _ => &[],
        };
        let right = |values: Vec<f64>| f64::from(u8::from(first_largest(&values) == Some(question.gold)));
        let per_character =
            sums.iter().zip(&question.choices).map(|(s, c)| s / c.chars().count().max(1) as f64).collect();
        BTreeMap::from([("acc".to_owned(), right(sums.to_vec())), ("acc_norm".to_owned(), right(per_character))])
    }

    fn main_metric(&self) -> &str {
        self.main_metric
    }
}

fn first_largest(values: &[f64]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, v) in values.iter().enumerate().filter(|(_, v)| !v.is_nan()) {
        if best.is_none_or(|b| *v > values[b]) {
            best = Some(i);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalising_can_change_the_winner_and_the_first_wins_ties() {
        let question = Question { query: "q".into(), choices: vec!["a".into(), "long one".into()], gold: 1 };
        let task = MultipleChoice::new("t", vec![question]).unwrap();
        let scores = task.score(0, &Response::Loglikelihoods(vec![-2.0, -4.0]));
        assert_eq!((scores["acc"], scores["acc_norm"]), (0.0, 1.0));
        for (sums, acc) in [
            (vec![-2.0, -2.0], 0.0),
            (vec![f64::NAN, -900.0], 1.0),
            (vec![f64::NAN, f64::NAN], 0.0),
            (vec![f64::NEG_INFINITY, -1.0], 1.0),
            (vec![-2.0], 0.0),
            (vec![], 0.0),
        ] {
            assert_eq!(task.score(0, &Response::Loglikelihoods(sums.clone()))["acc"], acc, "{sums:?}");
        }
        assert_eq!(task.score(0, &Response::Text("b".into()))["acc"], 0.0);
        assert_eq!(task.by_acc_norm().main_metric(), "acc_norm");
    }

    #[test]
    fn files_with_errors_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("facts.jsonl");
        let good = r#"{"query": "q", "choices": ["a", "b"], "gold": 1}"#;
        for (bad, part) in [(r#"{"query": "q"}"#, "choices"), (&good.replace("1}", "2}") as &str, "gold = 2")] {
            std::fs::write(&path, format!("{good}\n\n{bad}\n")).unwrap();
            let message = MultipleChoice::load(&path, None).err().unwrap().to_string();
            assert!(message.contains("line 3") && message.contains(part), "{message}");
        }
        std::fs::write(&path, format!("{good}\n{good}\n")).unwrap();
        assert_eq!(MultipleChoice::load(&path, Some(1)).unwrap().len(), 1);
        assert!(matches!(MultipleChoice::load(&path, Some(0)), Err(Error::NoDocuments { .. })));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(MultipleChoice::load(&path, None), Err(Error::NoDocuments { .. })));
        let question = Question { query: "q".into(), choices: vec![], gold: 0 };
        assert!(matches!(MultipleChoice::new("t", vec![question]), Err(Error::QuestionGold { .. })));
    }
}
