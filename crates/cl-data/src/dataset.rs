use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{Row, each_row, kind};
use crate::{Error, template};

/// What a model is shown, and what it should answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// Shown; not learned.
    pub prompt: String,
    /// Learned.
    pub answer: String,
}

/// Examples of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// Name of the task: that of the directory for a split, else of the file.
    pub name: String,
    /// The examples in file order.
    pub examples: Vec<Example>,
    /// The file.
    pub path: PathBuf,
    /// blake3 of the file, hexadecimal.
    pub hash: String,
}

/// How rows are turned into examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// By the keys of the first row.
    #[default]
    Auto,
    /// `prompt` and `answer`, verbatim: TRACE's, and anybody's own.
    PromptAnswer,
    /// `instruction`, `input` (may be absent) and `output` in Alpaca's prompt.
    Alpaca,
    /// `query` and `response` in Alpaca's prompt, split at the first line.
    MetaMath,
    /// `question` and `answer` as the evaluation harness asks GSM8K.
    Gsm8k,
}

/// A part of a task's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// To train on.
    Train,
    /// To tune on.
    Eval,
    /// To be scored on.
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

/// Reads the split of a task directory as TRACE lays it out: `train.json`, `eval.json`, `test.json`; also `.jsonl`,
/// either with `.gz`, and `.parquet`.
///
/// # Errors
/// [`Error::NoSplit`], and those of [`load`].
pub fn load_split(dir: &Path, split: Split) -> Result<Dataset, Error> {
    let path = ["json", "jsonl", "json.gz", "jsonl.gz", "parquet"]
        .iter()
        .map(|extension| dir.join(format!("{}.{extension}", split.name())))
        .find(|p| p.exists())
        .ok_or_else(|| Error::NoSplit { dir: dir.to_owned(), split: split.name() })?;
    let mut dataset = load(&path, Format::Auto)?;
    if let Some(name) = dir.file_name() {
        dataset.name = name.to_string_lossy().into_owned();
    }
    Ok(dataset)
}

/// Reads a `.json` file (a list of objects) or a `.jsonl` file (an object a line), either gzipped or not, or a
/// `.parquet` file. The content decides, not the name; blank lines and a byte-order mark are skipped.
///
/// The file is read row by row: no more than the examples and one row, of at most [`MAX_LINE`](crate::MAX_LINE) bytes, are in
/// memory. Only regular files are read.
///
/// # Errors
/// [`Error::File`], [`Error::Io`], [`Error::Form`], [`Error::LongLine`], [`Error::Row`] with the row's index,
/// [`Error::Empty`].
pub fn load(path: &Path, format: Format) -> Result<Dataset, Error> {
    let (mut format, mut examples) = (format, Vec::new());
    let hash = each_row(path, &mut |row, object| {
        if format == Format::Auto {
            format = detect(path, &object)?;
        }
        let wrong = |message| Error::Row { path: path.to_owned(), row, message };
        examples.push(example(&object, format).map_err(wrong)?);
        Ok(())
    })?;
    if examples.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let name = file.split('.').next().unwrap_or(&file).to_owned();
    Ok(Dataset { name, examples, path: path.to_owned(), hash })
}

fn detect(path: &Path, row: &Row) -> Result<Format, Error> {
    let has = |keys: [&str; 2]| keys.iter().all(|k| row.contains_key(*k));
    if has(["prompt", "answer"]) {
        Ok(Format::PromptAnswer)
    } else if has(["instruction", "output"]) {
        Ok(Format::Alpaca)
    } else if has(["query", "response"]) {
        Ok(Format::MetaMath)
    } else if has(["question", "answer"]) {
        Ok(Format::Gsm8k)
    } else {
        let beginning = |key: &String| key.chars().take(40).collect::<String>();
        let keys: Vec<String> = row.keys().take(20).map(beginning).collect();
        let more = if row.len() > keys.len() { ", …" } else { "" };
        let message = format!(
            "keys [{}{more}] are none of: prompt and answer; instruction and output; query and response; question and answer",
            keys.join(", ")
        );
        Err(Error::Row { path: path.to_owned(), row: 0, message })
    }
}

fn example(row: &Row, format: Format) -> Result<Example, String> {
    let text = |key: &str| match row.get(key) {
        Some(Value::String(s)) => Ok(s.as_str()),
        Some(other) => Err(format!("`{key}` is {}, expected text", kind(other))),
        None => Err(format!("`{key}` is missing")),
    };
    Ok(match format {
        Format::Auto | Format::PromptAnswer => {
            Example { prompt: text("prompt")?.to_owned(), answer: text("answer")?.to_owned() }
        }
        Format::Alpaca => {
            let input = if row.contains_key("input") { text("input")? } else { "" };
            Example { prompt: template::alpaca(text("instruction")?, input), answer: text("output")?.to_owned() }
        }
        Format::MetaMath => template::metamath(text("query")?, text("response")?),
        Format::Gsm8k => template::gsm8k(text("question")?, text("answer")?),
    })
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
                assert!(data.examples[0].prompt.contains(prompt), "{:?}", data.examples);
                assert_eq!(data.examples[0].answer, answer);
            }
        }
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
            (br#"{"text": "x"}"#, "keys [text] are none of"),
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
