//! Finds rows that are probably mistakes, before training starts.

use std::collections::HashSet;
use std::fmt;

use rayon::prelude::*;

use crate::{Dataset, Encoding, Error, Example};

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

/// Maximum number of rows that a finding names.
const NAMED: usize = 5;

/// The rows to which a finding applies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Number of rows.
    pub rows: usize,
    /// 0-based indices of the first few rows.
    pub first: Vec<usize>,
}

impl Found {
    /// Adds a row.
    pub(crate) fn note(&mut self, row: usize) {
        if self.first.len() < NAMED {
            self.first.push(row);
        }
        self.rows += 1;
    }
}

/// Prints the indices of the rows: `row 3 (from 0)`, `rows 3, 7 (from 0)`, or `first rows: …` if there are more.
impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.first.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let what = match self.rows {
            1 => "row",
            rows if rows > self.first.len() => "first rows:",
            _ => "rows",
        };
        write!(f, "{what} {rows} (from 0)")
    }
}

/// Findings about the rows of a data set; they are warnings, not errors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataReport {
    /// Number of rows.
    pub rows: usize,
    /// Rows whose answer is empty or white space, so that hardly more than the EOS token is trained. Rows of
    /// [`DataReport::empty`] and [`DataReport::unsupervised`] are not counted.
    pub empty_answers: Found,
    /// Rows whose prompt and answer are both empty or white space.
    pub empty: Found,
    /// Rows without a token that the loss covers, because they are empty or because `max_length` cuts off all answers.
    /// Nothing if rows were not tokenized.
    pub unsupervised: Found,
    /// Rows of the whole file with `tools`, which are not passed to the chat template.
    pub ignored_tools: Found,
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
    /// The `max_length` that [`DataReport::cut`] and [`DataReport::unsupervised`] refer to.
    pub max_length: Option<usize>,
}

/// Inspects rows in one pass; if `test` is given, prompts are looked up in it. Memory: 16 bytes per row, plus the
/// overhead of the hash table.
///
/// Tokens are counted separately, by [`DataReport::count_lengths`]. Row indices are those of `examples`; see
/// [`DataReport::of_file`].
///
/// ```
/// use cl_data::{Example, inspect};
///
/// let rows = [Example::pair("a", "b"), Example::pair("c", " "), Example::pair("a", "b")];
/// let report = inspect(&rows, None);
/// assert_eq!((report.empty_answers.rows, report.duplicates.first.as_slice()), (1, &[2][..]));
/// assert_eq!(report.to_string().lines().count(), 2);
/// ```
pub fn inspect(examples: &[Example], test: Option<&Prompts>) -> DataReport {
    let mut report = DataReport { rows: examples.len(), ..DataReport::default() };
    let mut seen = HashSet::with_capacity(examples.len());
    for (row, example) in examples.iter().enumerate() {
        if is_blank(example) {
            report.empty.note(row);
        } else if example.is_empty() {
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

/// Whether a pair has neither a prompt nor an answer.
fn is_blank(example: &Example) -> bool {
    matches!(example, Example::Pair { prompt, answer } if prompt.trim().is_empty() && answer.trim().is_empty())
}

/// Chat templates either render other roles as well, or omit their messages, so a misspelt role would go unnoticed.
fn has_unusual_role(example: &Example) -> bool {
    const USUAL: [&str; 8] =
        ["system", "developer", "user", "assistant", "tool", "tool_call", "tool_response", "function"];
    let Example::Chat { messages, .. } = example else { return false };
    messages.iter().any(|message| !USUAL.contains(&message.role.as_str()))
}

impl DataReport {
    /// Tokenizes the rows in parallel to count those that `encoding.max_length` truncates, and those that then have no
    /// token that the loss covers. Tokens are not kept.
    ///
    /// # Errors
    /// Returns the same errors as [`Encoding::examples`].
    pub fn count_lengths(&mut self, encoding: Encoding<'_>, examples: &[Example]) -> Result<(), Error> {
        let (whole, max_length) = (Encoding { max_length: None, ..encoding }, encoding.max_length);
        let is_cut = |length| max_length.is_some_and(|max| length > max);
        let count = |example: &Example| {
            let encoded = whole.example(example)?;
            let length = encoded.input_ids.len();
            let trained = if is_cut(length) { encoding.example(example)? } else { encoded };
            Ok((length, trained.targets() > 0))
        };
        let numbered = |(row, example): (usize, &Example)| {
            count(example).map_err(|source| Error::Example { row, source: Box::new(source) })
        };
        let counts = examples.par_iter().enumerate().map(numbered).collect::<Result<Vec<(usize, bool)>, Error>>()?;
        self.longest = counts.iter().map(|(length, _)| *length).max().unwrap_or(0);
        self.max_length = max_length;
        (self.cut, self.unsupervised, self.empty_answers) = (Found::default(), Found::default(), Found::default());
        for (row, &(length, supervised)) in counts.iter().enumerate() {
            if is_cut(length) {
                self.cut.note(row);
            }
            if !supervised {
                self.unsupervised.note(row);
            } else if examples[row].is_empty() && !is_blank(&examples[row]) {
                self.empty_answers.note(row);
            }
        }
        Ok(())
    }

    /// Adds what is known about the file of the examples, and converts row indices to those of the file if rows were
    /// held out from it.
    pub fn of_file(&mut self, data: &Dataset) {
        if let Some(held_out) = data.held_out {
            let in_file = held_out.remaining(data.examples.len() + held_out.rows);
            let Self { empty_answers, empty, unsupervised, duplicates, in_test, unusual_roles, cut, .. } = self;
            for found in [empty_answers, empty, unsupervised, duplicates, in_test, unusual_roles, cut] {
                found.first.iter_mut().for_each(|row| *row = in_file[*row]);
            }
        }
        self.ignored_tools = data.ignored_tools.clone();
    }
}

/// Prints one line per finding; nothing if there are none.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.max_length.map_or_else(String::new, |max| format!(" at max_length = {max}"));
        let max_length = self.max_length.unwrap_or_default();
        let unsupervised = format!(
            "have no token that the loss covers{at}; a step in which all rows are like this stops the training"
        );
        let cut =
            format!("are longer than max_length = {max_length} (up to {} tokens) and are truncated", self.longest);
        let kinds = [
            (&self.empty, "are empty: neither prompt nor answer has any text"),
            (&self.unsupervised, unsupervised.as_str()),
            (&self.empty_answers, "have an empty answer, so only the EOS token is trained"),
            (&self.ignored_tools, "have `tools`, which are ignored: they are not passed to the chat template"),
            (&self.unusual_roles, "have a message with an unusual role (usual: system, user, assistant, tool)"),
            (&self.cut, cut.as_str()),
            (&self.duplicates, "repeat an earlier row"),
            (&self.in_test, "have a prompt that is also in the test split"),
        ];
        let mut line = "";
        for (found, what) in kinds.into_iter().filter(|(found, _)| found.rows > 0) {
            // Those with tools are counted in the whole file.
            let whole = std::ptr::eq(found, &self.ignored_tools);
            let of = if whole { "the file's".to_owned() } else { self.rows.to_string() };
            write!(f, "{line}{} of {of} rows {what}; {found}", found.rows)?;
            line = "\n";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{ChatTemplate, HeldOut, Message, Profile, Tokenizer};

    fn rows(texts: &[(&str, &str)]) -> Vec<Example> {
        texts.iter().map(|(p, a)| Example::pair(*p, *a)).collect()
    }

    fn found(rows: usize, first: &[usize]) -> Found {
        Found { rows, first: first.to_vec() }
    }

    #[test]
    fn every_kind_is_counted_by_itself() {
        let test = rows(&[("t", "x"), ("u", "y")]);
        let mut prompts = Prompts::default();
        prompts.extend(&test);
        let train = rows(&[("a", "b"), ("t", "z"), ("a", ""), ("a", "\n"), ("a", "b"), ("t", "z"), ("ab", "")]);
        let report = inspect(&train, Some(&prompts));
        assert_eq!(report.empty_answers, found(3, &[2, 3, 6]));
        assert_eq!(report.duplicates, found(2, &[4, 5]));
        assert_eq!(report.in_test, found(2, &[1, 5]));
        let text = report.to_string();
        assert!(text.contains("3 of 7 rows have an empty answer"), "{text}");
        assert!(text.contains("repeat an earlier row; rows 4, 5 (from 0)"), "{text}");
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    /// A tokenizer of one-character tokens `a` and `b`, with or without a BOS token before each text.
    fn tokenizer(bos: bool) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let special = |id: usize, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let sequence =
            [json!({"SpecialToken": {"id": "<s>", "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}})];
        let template = json!({"type": "TemplateProcessing", "single": sequence, "pair": sequence,
                              "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}}});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(2, "<s>"), special(3, "</s>")],
            "normalizer": null, "pre_tokenizer": null, "post_processor": if bos { template } else { json!(null) },
            "decoder": null, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).unwrap();
        Tokenizer::from_dir(folder.path()).unwrap()
    }

    fn report(bos: bool, examples: &[Example], max_length: Option<usize>) -> DataReport {
        let template =
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}";
        let (tokenizer, chat) = (tokenizer(bos), ChatTemplate::new(template, &[]).unwrap());
        let encoding = Encoding { tokenizer: &tokenizer, chat: Some(&chat), max_length, profile: Profile::Method };
        let mut report = inspect(examples, None);
        report.count_lengths(encoding, examples).unwrap();
        report
    }

    #[test]
    fn rows_without_a_supervised_token_are_named() {
        let chat = |question: &str, answer: &str| {
            Example::chat([Message::new("user", question), Message::new("assistant", answer)])
        };
        let examples =
            [rows(&[("", ""), ("a", "b"), ("b", "")]), vec![chat("aaaa", "b"), chat("aa", "b"), chat("a", "")]]
                .concat();
        let long = report(false, &examples, None);
        assert_eq!((long.unsupervised.first.as_slice(), long.empty.first.as_slice()), (&[0][..], &[0][..]));
        assert_eq!(long.empty_answers, found(2, &[2, 5]));
        let short = report(false, &examples, Some(4));
        assert_eq!((&short.unsupervised, &short.cut), (&found(2, &[0, 3]), &found(1, &[3])));
        let part = "2 of 6 rows have no token that the loss covers at max_length = 4; a step in which all rows are like \
                    this stops the training; rows 0, 3 (from 0)";
        assert!(short.to_string().lines().any(|line| line == part), "{short}");
        // With BOS, EOS has a context, so it is trained.
        let bos = report(true, &examples, None);
        assert_eq!((bos.unsupervised, bos.empty), (Found::default(), found(1, &[0])));
        // An answer that is cut off is not trained, whether or not it is empty.
        let cut = report(false, &[chat("aaaa", "")], Some(4));
        assert_eq!((cut.unsupervised.rows, cut.empty_answers.rows), (1, 0));
        let many = report(false, &vec![Example::pair("", ""); 9], None).to_string();
        assert!(many.contains("9 of 9 rows are empty: neither prompt nor answer has any text"), "{many}");
        assert!(many.contains("stops the training; first rows: 0, 1, 2, 3, 4 (from 0)"), "{many}");
        assert!(!many.contains("EOS"), "{many}");
    }

    #[test]
    fn rows_are_those_of_the_file() {
        let mut examples = vec![Example::pair("a", "b"); 20];
        examples[11] = Example::pair("a", "");
        let mut data = Dataset {
            name: "x".into(),
            examples,
            path: "x.jsonl".into(),
            hash: String::new(),
            held_out: None,
            ignored_tools: found(1, &[7]),
        };
        let held = (0..).find(|&seed| {
            let held_out = HeldOut { rows: 5, seed };
            let rows = held_out.indices(20);
            rows.contains(&0) && !rows.contains(&11)
        });
        data.hold_out(0.25, held.unwrap());
        let mut report = inspect(&data.examples, None);
        assert_ne!(report.empty_answers.first, [11]);
        report.of_file(&data);
        assert_eq!(report.empty_answers.first, [11]);
        let text = report.to_string();
        assert!(text.contains("1 of 15 rows have an empty answer"), "{text}");
        assert!(text.contains("1 of the file's rows have `tools`, which are ignored"), "{text}");
    }

    #[test]
    fn misspelt_roles_are_found() {
        let chat = |roles: [&str; 2]| Example::chat(roles.map(|role| Message::new(role, "x")));
        let report = inspect(&[chat(["user", "assistant"]), chat(["usr", "assistant"])], None);
        assert_eq!(report.unusual_roles, found(1, &[1]));
        assert!(report.to_string().ends_with("tool); row 1 (from 0)"), "{report}");
    }

    #[test]
    fn nothing_found_is_nothing_said() {
        assert_eq!(inspect(&rows(&[("a", "bc"), ("ab", "c")]), None).to_string(), "");
        assert_eq!(inspect(&[], None), DataReport::default());
    }
}
