use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use cl_data::{Line, read_lines};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::request::Loglikelihood;

/// A tokenized request, with everything that the answer depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenRequest<'a> {
    /// A request for the log-likelihood of the tokens from `from` on.
    Loglikelihood {
        /// Context and continuation, after truncation.
        tokens: &'a [u32],
        /// Index of the continuation's first token.
        from: usize,
    },
    /// A request for the continuation by greedy decoding.
    Generate {
        /// The prompt, after truncation.
        tokens: &'a [u32],
        /// Maximum number of new tokens.
        max_new_tokens: usize,
        /// Stop sequences.
        stop: &'a [String],
    },
}

/// The answer to a [`TokenRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Answer to [`TokenRequest::Loglikelihood`].
    Loglikelihood(Loglikelihood),
    /// Answer to [`TokenRequest::Generate`].
    Text(String),
}

/// A persistent cache of a model's answers, keyed by request.
///
/// The file is `DIR/<blake3 of the fingerprint>.jsonl`, with one answer per line; it is append-only. The key of an
/// answer is a blake3 hash of the model's fingerprint (its weights, adapter and dtype) and the request. Each line has a
/// checksum over key and answer; incomplete or damaged lines are skipped when reading ([`ResponseCache::damaged`]).
/// Several processes may append to one file.
///
/// If the file cannot be read or written, answers are cached in memory only, and [`ResponseCache::failure`] returns the
/// reason.
///
/// ```
/// use cl_eval::{Answer, TokenRequest, ResponseCache};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let dir = folder.path();
/// let question = TokenRequest::Generate { tokens: &[1, 2, 3], max_new_tokens: 8, stop: &[] };
/// let mut cache = ResponseCache::open(dir, "weights:f32");
/// assert_eq!(cache.get(&question), None);
/// cache.put(&question, Answer::Text("four".into()));
/// // Another process, later:
/// assert_eq!(ResponseCache::open(dir, "weights:f32").get(&question), Some(&Answer::Text("four".into())));
/// assert_eq!(ResponseCache::open(dir, "other weights:f32").get(&question), None);
/// # Ok(())
/// # }
/// ```
pub struct ResponseCache {
    path: PathBuf,
    fingerprint: String,
    answers: HashMap<String, Answer>,
    damaged: Vec<usize>,
    file: Option<File>,
    failure: Option<Error>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    answer: Answer,
    check: String,
}

impl ResponseCache {
    /// Reads the cached answers of a model, and opens the file for appending.
    pub fn open(dir: &Path, fingerprint: &str) -> ResponseCache {
        let name = &blake3::hash(fingerprint.as_bytes()).to_hex()[..32];
        let path = dir.join(format!("{name}.jsonl"));
        let fingerprint = fingerprint.to_owned();
        let (answers, damaged) = (HashMap::new(), Vec::new());
        let mut cache = ResponseCache { path, fingerprint, answers, damaged, file: None, failure: None };
        if let Err(error) = cache.read().and_then(|()| cache.append()) {
            cache.failure = Some(error);
        }
        cache
    }

    fn read(&mut self) -> Result<(), Error> {
        if !self.path.exists() {
            return Ok(());
        }
        for line in read_lines(&self.path)? {
            let Line { number, bytes } = line?;
            match serde_json::from_slice::<Entry>(&bytes) {
                Ok(line) if line.check == check(&line.key, &line.answer) => {
                    self.answers.insert(line.key, line.answer);
                }
                _ if bytes == b"\n" => {}
                _ => self.damaged.push(number),
            }
        }
        Ok(())
    }

    /// Opens the file for appending.
    fn append(&mut self) -> Result<(), Error> {
        let file = open(&self.path).map_err(|source| Error::Io { path: self.path.clone(), source })?;
        self.file = Some(file);
        Ok(())
    }

    /// Returns the error that stopped reading or writing the file, if any.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of answers.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether there are no answers.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Returns the 1-based numbers of lines that were skipped because they are incomplete or damaged.
    pub fn damaged(&self) -> &[usize] {
        &self.damaged
    }

    /// Returns the cached answer to a request.
    pub fn get(&self, question: &TokenRequest<'_>) -> Option<&Answer> {
        self.answers.get(&self.key(question))
    }

    /// Caches an answer, and appends it to the file unless writing has failed before.
    pub fn put(&mut self, question: &TokenRequest<'_>, answer: Answer) {
        let key = self.key(question);
        let check = check(&key, &answer);
        let line = Entry { key, answer, check };
        if let Some(file) = &mut self.file
            && let Err(source) = write(file, &line)
        {
            self.failure = Some(Error::Io { path: self.path.clone(), source });
            self.file = None;
        }
        self.answers.insert(line.key, line.answer);
    }

    fn key(&self, question: &TokenRequest<'_>) -> String {
        let json = serde_json::to_vec(&(&self.fingerprint, question)).expect("texts and numbers always serialize");
        blake3::hash(&json).to_hex()[..32].to_owned()
    }
}

/// Opens a file for appending, and terminates its last line if that is incomplete.
fn open(path: &Path) -> std::io::Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    file.lock()?;
    if file.metadata()?.len() > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    file.unlock()?;
    Ok(file)
}

/// Appends a line under a file lock.
fn write(file: &mut File, line: &Entry) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    file.lock()?;
    let written = file.write_all(&bytes);
    file.unlock()?;
    written
}

fn check(key: &str, answer: &Answer) -> String {
    let json = serde_json::to_vec(&(key, answer)).expect("texts and numbers always serialize");
    blake3::hash(&json).to_hex()[..8].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(tokens: &[u32]) -> TokenRequest<'_> {
        TokenRequest::Loglikelihood { tokens, from: 1 }
    }

    fn answer(sum: f64) -> Answer {
        Answer::Loglikelihood(Loglikelihood { sum, greedy: false, tokens: 2 })
    }

    #[test]
    fn answers_come_back_bit_for_bit_and_only_to_the_same_question() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("new/folder");
        let sums = [-0.1 - 0.2, f64::NEG_INFINITY, -1e-300, 0.0];
        let mut cache = ResponseCache::open(&dir, "m");
        for (i, sum) in sums.into_iter().enumerate() {
            cache.put(&question(&[i as u32, 7]), answer(sum));
        }
        let read = ResponseCache::open(&dir, "m");
        for (i, sum) in sums.into_iter().enumerate() {
            let Some(Answer::Loglikelihood(l)) = read.get(&question(&[i as u32, 7])) else { panic!("{i}") };
            assert_eq!(l.sum.to_bits(), sum.to_bits());
        }
        assert_eq!((read.len(), read.damaged()), (4, &[][..]));
        assert_eq!(read.get(&question(&[0, 7, 7])), None);
        assert_eq!(read.get(&TokenRequest::Loglikelihood { tokens: &[0, 7], from: 2 }), None);
        assert_eq!(read.get(&TokenRequest::Generate { tokens: &[0, 7], max_new_tokens: 1, stop: &[] }), None);
        assert!(ResponseCache::open(&dir, "n").is_empty());
    }

    #[test]
    fn damaged_lines_are_left_out_and_the_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = ResponseCache::open(folder.path(), "m");
        (0..4).for_each(|i| cache.put(&question(&[i, 7]), answer(-f64::from(i) - 0.5)));
        let path = cache.path().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        // Three damaged lines: valid JSON with a changed number, invalid JSON, and a truncated line.
        std::fs::write(&path, text.replace("-1.5", "-2.5").replacen("{", "[", 1).trim_end().trim_end_matches('}'))
            .unwrap();
        let mut cache = ResponseCache::open(folder.path(), "m");
        assert_eq!(cache.damaged(), [1, 2, 4]);
        assert!(cache.get(&question(&[2, 7])).is_some());
        cache.put(&question(&[3, 7]), answer(-3.5));
        let read = ResponseCache::open(folder.path(), "m");
        assert_eq!((read.len(), read.damaged().len()), (2, 3));
        assert_eq!(read.get(&question(&[3, 7])), Some(&answer(-3.5)));
        // A line that is not valid UTF-8.
        std::fs::write(&path, [b"\xff\x00\n".as_slice(), text.as_bytes()].concat()).unwrap();
        let read = ResponseCache::open(folder.path(), "m");
        assert_eq!((read.len(), read.damaged()), (4, &[1][..]));
    }

    #[test]
    fn a_folder_that_cannot_be_made_costs_the_cache_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a file");
        std::fs::write(&file, "").unwrap();
        let mut cache = ResponseCache::open(&file.join("responses"), "m");
        assert!(cache.failure().unwrap().to_string().contains("a file"), "{:?}", cache.failure());
        cache.put(&question(&[1, 7]), answer(-1.5));
        assert_eq!(cache.get(&question(&[1, 7])), Some(&answer(-1.5)));
    }

    #[cfg(unix)]
    #[test]
    fn a_fifo_in_its_place_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = ResponseCache::open(folder.path(), "m").path().to_owned();
        std::fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let cache = ResponseCache::open(folder.path(), "m");
        assert!(cache.failure().unwrap().to_string().contains("FIFO"), "{:?}", cache.failure());
    }
}
