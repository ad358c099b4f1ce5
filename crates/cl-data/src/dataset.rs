use std::path::{Path, PathBuf};

use crate::row_format::RowFormat;
use crate::rows::each_row;
use crate::{Columns, Error, Example, Format, Found, HeldOut};

/// The examples of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// Name of the task: for a split the name of its directory, otherwise the name of the file.
    pub name: String,
    /// The examples in file order.
    pub examples: Vec<Example>,
    /// The file.
    pub path: PathBuf,
    /// Hexadecimal blake3 hash of the file.
    pub hash: String,
    /// Rows that were removed from the examples for validation.
    pub held_out: Option<HeldOut>,
    /// Rows of the file with `tools`, which are not passed to the chat template.
    pub ignored_tools: Found,
}

/// A split of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Training data.
    Train,
    /// Validation data.
    Eval,
    /// Test data.
    Test,
}

impl Split {
    fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Eval => "eval",
            Split::Test => "test",
        }
    }
}

/// Reads a split of a task directory in TRACE's layout: `train.json`, `eval.json` or `test.json`; also `.jsonl`,
/// `.csv`, `.tsv` and `.txt`, each optionally with `.gz`, and `.parquet`.
///
/// # Errors
/// Returns [`Error::NoSplit`] if there is no such file, and the errors of [`load`].
pub fn load_split(dir: &Path, split: Split) -> Result<Dataset, Error> {
    load_split_as(dir, split, Format::Auto, &Columns::default())
}

/// Like [`load_split`], with the format and columns of [`load_as`].
///
/// # Errors
/// Returns the same errors as [`load_split`].
pub fn load_split_as(dir: &Path, split: Split, format: Format, columns: &Columns) -> Result<Dataset, Error> {
    let plain = ["json", "jsonl", "csv", "tsv", "txt"].into_iter();
    let path = plain
        .flat_map(|extension| [extension.to_owned(), format!("{extension}.gz")])
        .chain(["parquet".to_owned()])
        .map(|extension| dir.join(format!("{}.{extension}", split.name())))
        .find(|p| p.exists())
        .ok_or_else(|| Error::NoSplit { dir: dir.to_owned(), split: split.name() })?;
    let mut dataset = load_as(&path, format, columns)?;
    if let Some(name) = dir.file_name() {
        dataset.name = name.to_string_lossy().into_owned();
    }
    Ok(dataset)
}

/// Reads a file of rows and converts each row to an example. See [`read_rows`](crate::read_rows) for supported files.
///
/// # Errors
/// Returns the errors of [`read_rows`](crate::read_rows), [`Error::Row`] if a row does not fit the format, and
/// [`Error::Empty`] if there are no rows.
pub fn load(path: &Path, format: Format) -> Result<Dataset, Error> {
    load_as(path, format, &Columns::default())
}

/// Like [`load`], with a given format and column names.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// use cl_data::{Columns, Example, Format, load_as};
///
/// let path = folder.path().join("words.csv");
/// std::fs::write(&path, "german,english\nHund,dog\n")?;
/// let columns =
///     Columns { prompt: Some("Translate: {{ german }}\n".into()), answer: Some("english".into()), messages: None };
/// let data = load_as(&path, Format::Auto, &columns)?;
/// assert_eq!(data.examples, [Example::pair("Translate: Hund\n", "dog")]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Returns the same errors as [`load`], and [`Error::Columns`] if `columns` is invalid.
pub fn load_as(path: &Path, format: Format, columns: &Columns) -> Result<Dataset, Error> {
    let wrong = |problem| Error::Columns { path: path.to_owned(), problem };
    let row_format = RowFormat::new(format, columns).map_err(wrong)?;
    let (mut examples, mut ignored_tools) = (Vec::new(), Found::default());
    let hash = each_row(path, &|names| row_format.used(names), &mut |index, row| {
        examples.push(row_format.example(path, index, &row)?);
        if row_format.ignores_tools(&row) {
            ignored_tools.note(index);
        }
        Ok(())
    })?;
    if examples.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let name = file.split('.').next().unwrap_or(&file).to_owned();
    Ok(Dataset { name, examples, path: path.to_owned(), hash, held_out: None, ignored_tools })
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn write(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn gz(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_format_and_container() {
        let rows: [(&[u8], &str, &str); 6] = [
            (br#"[{"prompt": "p", "answer": "a"}]"#, "p", "a"),
            (b"\xef\xbb\xbf{\"prompt\": \"p\", \"answer\": \"\"}\n\n", "p", ""),
            (br#"{"instruction": "i", "input": "n", "output": "o"}"#, "### Input:\nn", "o"),
            (br#"{"instruction": "i", "output": "o"}"#, "### Instruction:\ni", "o"),
            (br#"[{"query": "q", "response": "r", "type": "GSM_AnsAug"}]"#, "### Instruction:\nq", "r"),
            (br#"{"question": "q", "answer": "42"}"#, "Question: q\nAnswer:", " 42"),
        ];
        for (content, prompt, answer) in rows {
            for content in [content.to_vec(), gz(content)] {
                let (_folder, path) = write("x.json", &content);
                let data = load(&path, Format::Auto).unwrap();
                assert!(data.examples[0].shown().contains(prompt), "{:?}", data.examples);
                assert_eq!(data.examples[0].answer(), answer);
            }
        }
    }

    #[test]
    fn tables_and_plain_text() {
        type Case<'c> = (&'c str, &'c [u8], &'c [(&'c str, &'c str)]);
        let rows: [Case<'_>; 4] = [
            ("x.csv", b"prompt,answer\n\"a, b\",\"c\nd\"\ne,f\n", &[("a, b", "c\nd"), ("e", "f")]),
            ("x.tsv", b"\xef\xbb\xbfquestion\tanswer\nq\t7\n", &[("Question: q\nAnswer:", " 7")]),
            ("x.txt", b"one\ntwo\n\n\n \nthree", &[("", "one\ntwo"), ("", "three")]),
            ("X.TXT", b"one\r\n\r\ntwo\r\n", &[("", "one"), ("", "two")]),
        ];
        for (name, content, expected) in rows {
            let expected: Vec<Example> = expected.iter().map(|(p, a)| Example::pair(*p, *a)).collect();
            let (_folder, path) = write(name, content);
            assert_eq!(load(&path, Format::Auto).unwrap().examples, expected);
            let (_folder, path) = write(&format!("{name}.gz"), &gz(content));
            assert_eq!(load(&path, Format::Auto).unwrap().examples, expected);
        }
        let endless = [b"prompt,answer\n\"".as_slice(), &vec![b'x'; crate::MAX_LINE + 9]].concat();
        for (content, part) in [
            (b"prompt,answer\na\n".as_slice(), "line 2: has 1 fields, but the first line has 2"),
            (b"prompt,prompt\na,b\n", "has the field `prompt` twice"),
            (b"prompt,answer\n\xff,b\n", "not UTF-8"),
            (&endless, "quotation mark"),
        ] {
            let (_folder, path) = write("x.csv", content);
            let message = load(&path, Format::Auto).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn the_separator_of_a_table_is_that_of_its_first_line() {
        for (content, prompt, answer) in [
            ("prompt;answer\na, b;c\td\n", "a, b", "c\td"),
            ("\u{feff}\r\n\"prompt\";\"answer\"\r\n\"a;b\";c\r\n", "a;b", "c"),
            ("prompt\tanswer\na;b\tc\n", "a;b", "c"),
            ("\"notes; long,\nin\ttwo lines\";prompt;answer\nx;a;b\n", "a", "b"),
            ("prompt;answer\ra;b\r", "a", "b"),
            // Commas come first, even if the line could be read in another way.
            ("prompt,answer,x;y\na,b,c\n", "a", "b"),
            ("prompt,answer,x\ty\na;,\tb,c\n", "a;", "\tb"),
        ] {
            let (_folder, path) = write("x.csv", content.as_bytes());
            assert_eq!(load(&path, Format::Auto).unwrap().examples, [Example::pair(prompt, answer)], "{content:?}");
            let (_folder, path) = write("x.csv.gz", &gz(content.as_bytes()));
            assert_eq!(load(&path, Format::Auto).unwrap().examples, [Example::pair(prompt, answer)], "{content:?}");
        }
        for content in ["a;b\tc\n1;2\t3\n", "\"a;b\"\n1\n", "a;b"] {
            let (_folder, path) = write("x.csv", content.as_bytes());
            let fields = crate::read_rows(&path).unwrap().rows.first().map_or(1, serde_json::Map::len);
            assert_eq!(fields, 1, "{content:?}");
        }
    }

    #[test]
    fn rows_with_tools_are_counted() {
        let messages = r#""messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#;
        let tools = ["null", "[]", "\"[]\"", "[{}]", "\"[{}]\""];
        let rows: String = tools.iter().map(|tools| format!("{{{messages}, \"tools\": {tools}}}\n")).collect();
        let (_folder, path) = write("x.jsonl", rows.as_bytes());
        assert_eq!(load(&path, Format::Auto).unwrap().ignored_tools, Found { rows: 2, first: vec![3, 4] });
        let (_folder, path) = write("x.jsonl", br#"{"prompt": "p", "answer": "a", "tools": "hammer"}"#);
        assert_eq!(load(&path, Format::Auto).unwrap().ignored_tools, Found::default());
    }

    #[test]
    fn a_relative_path_is_relative_to_the_current_directory() {
        let message = load(Path::new("data/missing.jsonl"), Format::Auto).unwrap_err().to_string();
        assert_eq!(message, "data/missing.jsonl: not found; relative paths start at the current directory");
        let (folder, _) = write("x.jsonl", b"");
        let message = load(&folder.path().join("missing.jsonl"), Format::Auto).unwrap_err().to_string();
        assert!(message.ends_with("missing.jsonl: not found"), "{message}");
    }

    #[test]
    fn errors_say_where() {
        let cut = gz(br#"[{"prompt": "p", "answer": "a"}]"#);
        let rows: [(&[u8], &str); 9] = [
            (b"", "no examples"),
            (b"[]", "no examples"),
            (b"{\"prompt\": \"p\", \"answer\": \"a\"}\n{\"prompt\": 1", "line 2"),
            (br#"[{"prompt": "p", "answer": "a"}, {"prompt": "p"}]"#, "row 1 (from 0): `answer` is missing"),
            (br#"[{"prompt": "p", "answer": 3}]"#, "`answer` is a number"),
            (br#"[1]"#, "row 0 (from 0): expected an object"),
            (br#"{"texts": "x"}"#, "unknown format with keys [texts]"),
            (b"{\"prompt\": \"\xff\"}", "not UTF-8"),
            (&cut[..cut.len() - 9], "x.json"),
        ];
        for (content, part) in rows {
            let (_folder, path) = write("x.json", content);
            let message = load(&path, Format::Auto).unwrap_err().to_string();
            assert!(message.contains(part) && message.contains("x.json"), "{message}");
        }
    }

    #[test]
    fn a_split_is_named_after_its_directory() {
        let (folder, _) = write("test.jsonl", br#"{"prompt": "p", "answer": "a"}"#);
        let data = load_split(folder.path(), Split::Test).unwrap();
        assert_eq!(data.name, folder.path().file_name().unwrap().to_string_lossy());
        let message = load_split(folder.path(), Split::Train).unwrap_err().to_string();
        assert!(message.contains("train.json"), "{message}");
    }
}
