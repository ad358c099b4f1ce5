//! Finds rows that are probably mistakes, before training starts.

use std::collections::HashSet;
use std::fmt;

use rayon::prelude::*;

use crate::{Encoding, Error, Example};

/// A set of prompts, stored as 128-bit hashes.
///
/// ```
/// let mut test = cl_data::Prompts::default();
/// test.insert("1 + 1 =");
/// assert!(test.contains("1 + 1 =") && !test.contains("1 + 2 ="));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Prompts(HashSet<u128>);

impl Prompts {
    /// Adds a prompt; returns `false` if it was already present.
    pub fn insert(&mut self, prompt: &str) -> bool {
        self.0.insert(half_hash(&[prompt]))
    }

    /// Whether a prompt is in the set.
    pub fn contains(&self, prompt: &str) -> bool {
        self.0.contains(&half_hash(&[prompt]))
    }
}

impl<'a> Extend<&'a Example> for Prompts {
    fn extend<I: IntoIterator<Item = &'a Example>>(&mut self, examples: I) {
        self.0.extend(examples.into_iter().map(|e| half_hash(&[&asked(e)])));
    }
}

/// Returns the prompt of an example, or the text itself for plain text.
fn asked(example: &Example) -> String {
    let shown = example.shown();
    if shown.is_empty() { example.answer().to_owned() } else { shown }
}

/// Hashes texts together with their lengths, so that different lists have different hashes.
fn half_hash(texts: &[&str]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let mut half = [0; 16];
    half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(half)
}

/// The rows to which a finding applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Number of rows.
    pub rows: usize,
    /// 0-based index of the first such row.
    pub first: usize,
}

impl Found {
    fn note(&mut self, row: usize) {
        if self.rows == 0 {
            self.first = row;
        }
        self.rows += 1;
    }
}

/// Findings about the rows of a data set; they are warnings, not errors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataReport {
    /// Number of rows.
    pub rows: usize,
    /// Rows whose answer is empty or white space, so that only the EOS token is trained.
    pub empty_answers: Found,
    /// Rows that repeat an earlier row, both prompt and answer.
    pub duplicates: Found,
    /// Rows whose prompt is in the test split.
    pub in_test: Found,
    /// Conversations with a role other than `system`, `developer`, `user`, `assistant` and the roles of tools.
    pub unusual_roles: Found,
    /// Rows longer than `max_length`, which are truncated.
    pub cut: Found,
    /// Length of the longest row in tokens; 0 if rows were not tokenized.
    pub longest: usize,
    /// The `max_length` that [`DataReport::cut`] refers to.
    pub max_length: Option<usize>,
}

/// Inspects rows in one pass; if `test` is given, prompts are looked up in it. Memory: 16 bytes per row, plus the
/// overhead of the hash table.
///
/// Lengths are counted separately, by [`DataReport::count_lengths`].
///
/// ```
/// use cl_data::{Example, inspect};
///
/// let rows = [Example::pair("a", "b"), Example::pair("c", " "), Example::pair("a", "b")];
/// let report = inspect(&rows, None);
/// assert_eq!((report.empty_answers.rows, report.duplicates.first), (1, 2));
/// assert_eq!(report.to_string().lines().count(), 2);
/// ```
pub fn inspect(examples: &[Example], test: Option<&Prompts>) -> DataReport {
    let mut report = DataReport { rows: examples.len(), ..DataReport::default() };
    let mut seen = HashSet::with_capacity(examples.len());
    for (row, example) in examples.iter().enumerate() {
        if example.is_empty() {
            report.empty_answers.note(row);
        }
        if !seen.insert(half_hash(&[&example.shown(), example.answer()])) {
            report.duplicates.note(row);
        }
        if has_unusual_role(example) {
            report.unusual_roles.note(row);
        }
        if test.is_some_and(|test| test.contains(&asked(example))) {
            report.in_test.note(row);
        }
    }
    report
}

/// Chat templates either render other roles as well, or omit their messages, so a misspelt role would go unnoticed.
fn has_unusual_role(example: &Example) -> bool {
    const USUAL: [&str; 8] =
        ["system", "developer", "user", "assistant", "tool", "tool_call", "tool_response", "function"];
    let Example::Chat { messages } = example else { return false };
    messages.iter().any(|message| !USUAL.contains(&message.role.as_str()))
}

impl DataReport {
    /// Tokenizes the rows in parallel to count those that `encoding.max_length` truncates. Tokens are not kept.
    ///
    /// # Errors
    /// Returns the same errors as [`Encoding::examples`].
    pub fn count_lengths(&mut self, encoding: Encoding<'_>, examples: &[Example]) -> Result<(), Error> {
        let (whole, max_length) = (Encoding { max_length: None, ..encoding }, encoding.max_length);
        let length = |(row, example): (usize, &Example)| match whole.example(example) {
            Ok(encoded) => Ok(encoded.input_ids.len()),
            Err(source) => Err(Error::Example { row, source: Box::new(source) }),
        };
        let lengths = examples.par_iter().enumerate().map(length).collect::<Result<Vec<usize>, Error>>()?;
        self.longest = lengths.iter().copied().max().unwrap_or(0);
        self.max_length = max_length;
        self.cut = Found::default();
        for (row, &length) in lengths.iter().enumerate() {
            if max_length.is_some_and(|max| length > max) {
                self.cut.note(row);
            }
        }
        Ok(())
    }
}

/// Prints one line per finding; nothing if there are none.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = match self.max_length {
            Some(max) => {
                format!("are longer than max_length = {max} (up to {} tokens) and are truncated", self.longest)
            }
            None => String::new(),
        };
        let kinds = [
            (self.empty_answers, "have an empty answer, so only the EOS token is trained"),
            (self.unusual_roles, "have a message with an unusual role (usual: system, user, assistant, tool)"),
            (self.cut, cut.as_str()),
            (self.duplicates, "repeat an earlier row"),
            (self.in_test, "have a prompt that is also in the test split"),
        ];
        let mut line = "";
        for (Found { rows, first }, what) in kinds.into_iter().filter(|(found, _)| found.rows > 0) {
            write!(f, "{line}{rows} of {} rows {what}; first: row {first} (from 0)", self.rows)?;
            line = "\n";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;

    fn rows(texts: &[(&str, &str)]) -> Vec<Example> {
        texts.iter().map(|(p, a)| Example::pair(*p, *a)).collect()
    }

    #[test]
    fn every_kind_is_counted_by_itself() {
        let test = rows(&[("t", "x"), ("u", "y")]);
        let mut prompts = Prompts::default();
        prompts.extend(&test);
        let train = rows(&[("a", "b"), ("t", "z"), ("a", ""), ("a", "\n"), ("a", "b"), ("t", "z"), ("ab", "")]);
        let report = inspect(&train, Some(&prompts));
        assert_eq!(report.empty_answers, Found { rows: 3, first: 2 });
        assert_eq!(report.duplicates, Found { rows: 2, first: 4 });
        assert_eq!(report.in_test, Found { rows: 2, first: 1 });
        let text = report.to_string();
        assert!(text.contains("3 of 7 rows have an empty answer"), "{text}");
        assert!(text.contains("first: row 4 (from 0)"), "{text}");
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    #[test]
    fn misspelt_roles_are_found() {
        let chat = |roles: [&str; 2]| Example::Chat { messages: roles.map(|role| Message::new(role, "x")).to_vec() };
        let report = inspect(&[chat(["user", "assistant"]), chat(["usr", "assistant"])], None);
        assert_eq!(report.unusual_roles, Found { rows: 1, first: 1 });
        assert!(report.to_string().contains("unusual role"), "{report}");
    }

    #[test]
    fn nothing_found_is_nothing_said() {
        assert_eq!(inspect(&rows(&[("a", "bc"), ("ab", "c")]), None).to_string(), "");
        assert_eq!(inspect(&[], None), DataReport::default());
    }
}
