use std::path::Path;

use cl_data::{BOM, Line, read_lines};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Task;
use crate::error::Error;
use crate::metrics::{Gold, Metric, Target};
use crate::request::{LoglikelihoodRequest, Request};

/// A multiple-choice question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// The context that precedes each choice.
    pub query: String,
    /// The choices. Each is scored with a leading space.
    pub choices: Vec<String>,
    /// Index of the correct choice.
    pub gold: usize,
}

/// A task of multiple-choice questions, answered by the most likely choice and scored by [`Metric::Acc`] or
/// [`Metric::AccNorm`].
pub struct MultipleChoice {
    name: String,
    questions: Vec<Question>,
    metric: Metric,
}

impl MultipleChoice {
    /// Creates a task from questions.
    ///
    /// # Errors
    /// Returns [`Error::NoDocuments`] if there are no questions, [`Error::QuestionFewChoices`] if one has fewer than
    /// two choices, and [`Error::QuestionGold`] if an index is out of range.
    pub fn new(name: &str, questions: Vec<Question>) -> Result<MultipleChoice, Error> {
        if questions.is_empty() {
            return Err(Error::NoDocuments { name: name.to_owned() });
        }
        for (question, Question { choices, gold, .. }) in questions.iter().enumerate() {
            let (task, gold, choices) = (name.to_owned(), *gold, choices.len());
            if choices < 2 {
                return Err(Error::QuestionFewChoices { task, question, choices });
            }
            if gold >= choices {
                return Err(Error::QuestionGold { task, question, gold, choices });
            }
        }
        Ok(MultipleChoice { name: name.to_owned(), questions, metric: Metric::Acc })
    }

    /// Returns the same task with `acc_norm` as its main metric.
    pub fn by_acc_norm(self) -> MultipleChoice {
        MultipleChoice { metric: Metric::AccNorm, ..self }
    }

    /// Reads at most `limit` questions from a JSONL file with a [`Question`] on every line.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, [`Error::Line`], [`Error::FewChoices`] or [`Error::Gold`] if a
    /// line is not a valid question, and [`Error::NoDocuments`] if there are none.
    pub fn load(path: &Path, limit: Option<usize>) -> Result<MultipleChoice, Error> {
        let mut questions = Vec::new();
        for (line, question) in lines::<Question>(path, r#"{"query": "…", "choices": ["…", "…"], "gold": 0}"#)? {
            let (gold, choices) = (question.gold, question.choices.len());
            if choices < 2 {
                return Err(Error::FewChoices { path: path.to_owned(), line, choices });
            }
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

/// Returns the non-blank lines of a JSONL file with their 1-based numbers.
pub(crate) fn lines<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<Vec<(usize, T)>, Error> {
    let parse = |line: Result<Line, cl_data::Error>| {
        let Line { number, bytes } = line?;
        let wrong = |error| Error::Line { path: path.to_owned(), line: number, expected, error };
        let json = if number == 1 { bytes.strip_prefix(BOM).unwrap_or(&bytes) } else { &bytes };
        Ok((number, serde_json::from_slice(json).map_err(wrong)?))
    };
    let blank = |line: &Result<Line, _>| line.as_ref().is_ok_and(Line::is_blank);
    read_lines(path)?.filter(|line| !blank(line)).map(parse).collect()
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

    fn target(&self, document: usize) -> Target {
        let Question { choices, gold, .. } = &self.questions[document];
        Target::Choice { choices: choices.clone(), gold: Gold::One(*gold) }
    }

    fn metric(&self) -> Metric {
        self.metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_errors_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("facts.jsonl");
        let good = r#"{"query": "q", "choices": ["a", "b"], "gold": 1}"#;
        let one = r#"{"query": "q", "choices": ["a"], "gold": 0}"#; // a single choice would always be correct
        let out_of_range = good.replace("1}", "2}");
        for (bad, part) in
            [(r#"{"query": "q"}"#, "choices"), (&out_of_range as &str, "gold = 2"), (one, "at least 2 are required")]
        {
            std::fs::write(&path, format!("{good}\n\n{bad}\n")).unwrap();
            let message = MultipleChoice::load(&path, None).err().unwrap().to_string();
            assert!(message.contains("line 3") && message.contains(part), "{message}");
        }
        std::fs::write(&path, format!("{good}\n{good}\n")).unwrap();
        assert_eq!(MultipleChoice::load(&path, Some(1)).unwrap().len(), 1);
        assert!(matches!(MultipleChoice::load(&path, Some(0)), Err(Error::NoDocuments { .. })));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(MultipleChoice::load(&path, None), Err(Error::NoDocuments { .. })));
        let question = |choices: &[&str], gold| Question {
            query: "q".into(),
            choices: choices.iter().map(|&c| c.to_owned()).collect(),
            gold,
        };
        let error = |question| MultipleChoice::new("t", vec![question]).err().unwrap();
        assert!(matches!(error(question(&["a"], 0)), Error::QuestionFewChoices { choices: 1, .. }));
        assert!(matches!(error(question(&["a", "b"], 2)), Error::QuestionGold { gold: 2, .. }));
    }
}
