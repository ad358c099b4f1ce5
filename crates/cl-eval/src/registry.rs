use std::path::Path;

use cl_data::{Dataset, Format, Split, load, load_split};
use serde::Deserialize;

use crate::few_shot::PythonRandom;
use crate::{Document, Error, GenerationTask, Metric, MultipleChoice, Task};

/// A task that is known by name.
#[derive(Clone, Copy, Debug)]
pub struct TaskSpec {
    /// Name, which is its directory's in TRACE's layout.
    pub name: &'static str,
    /// Other names it answers to.
    pub aliases: &'static [&'static str],
    /// How answers are scored.
    pub metric: Metric,
    /// Most tokens of an answer, unless asked otherwise.
    pub max_new_tokens: usize,
    /// Texts that end an answer.
    pub stop: &'static [&'static str],
}

const fn trace(
    name: &'static str,
    aliases: &'static [&'static str],
    metric: Metric,
    max_new_tokens: usize,
) -> TaskSpec {
    TaskSpec { name, aliases, metric, max_new_tokens, stop: &[] }
}

/// The tasks of the paper, in its order. Only the first character of C-STANCE, FOMC and ScienceQA answers counts, so
/// few tokens are enough there; TRACE itself writes up to 512 everywhere.
const KNOWN: [TaskSpec; 8] = [
    trace("C-STANCE", &["cstance", "cstan"], Metric::FirstChar, 8),
    trace("FOMC", &["fomc"], Metric::FirstChar, 8),
    trace("MeetingBank", &["meeting", "meetingbank", "meet"], Metric::RougeL, 256),
    trace("Py150", &["py150"], Metric::EditSimilarity, 64),
    trace("ScienceQA", &["science", "scienceqa", "sci"], Metric::FirstChar, 8),
    trace("20Minuten", &["20minuten", "20min"], Metric::Sari, 256),
    TaskSpec {
        name: "gsm8k",
        aliases: &[],
        metric: Metric::Gsm8k,
        max_new_tokens: 256,
        stop: &["Question:", "</s>", "<|im_end|>"],
    },
    TaskSpec {
        name: "gsm8k_cot",
        aliases: &["gsmcot"],
        metric: Metric::Gsm8k,
        max_new_tokens: 256,
        stop: &["Q:", "</s>", "<|im_end|>"],
    },
];

/// The tasks known by name.
pub fn known_tasks() -> &'static [TaskSpec] {
    &KNOWN
}

/// How a task is loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct TaskOptions {
    /// Only the first so many documents.
    pub limit: Option<usize>,
    /// Instead of the task's own.
    pub max_new_tokens: Option<usize>,
    /// Instead of the task's own; `exact_match` for a directory that is not a known task.
    pub metric: Option<Metric>,
}

/// Loads a task by name or alias from a directory of tasks: `DIR/<Task>/test.json` as TRACE has it; for GSM8K
/// `DIR/gsm8k/test.jsonl` (or `DIR/../gsm8k`), with its shots from `train.jsonl` beside it or from
/// `gsm8k_cot/fewshot.jsonl`. Any other directory with a test file of `{"prompt", "answer"}` is a task scored by
/// exact match; a `.jsonl` path is a file of multiple-choice questions.
///
/// # Errors
/// [`Error::UnknownTask`], and those of the files.
pub fn load_task(name: &str, dir: &Path, options: TaskOptions) -> Result<Box<dyn Task>, Error> {
    if name.ends_with(".jsonl") {
        let path = if Path::new(name).exists() { Path::new(name).to_owned() } else { dir.join(name) };
        return Ok(Box::new(MultipleChoice::load(&path, options.limit)?));
    }
    let wanted = name.to_lowercase();
    let spec = KNOWN.iter().find(|t| t.name.to_lowercase() == wanted || t.aliases.contains(&wanted.as_str()));
    let folder = spec.map_or(name, |s| s.name);
    let found = [dir.join(folder), dir.join("..").join(folder)].into_iter().find(|d| d.is_dir());
    let task = match (spec, found) {
        (Some(spec), _) if spec.metric == Metric::Gsm8k => gsm8k(spec, dir)?,
        (Some(spec), Some(folder)) => {
            plain(spec.name, spec.metric, spec.max_new_tokens, load_split(&folder, Split::Test)?)
        }
        (None, Some(folder)) if dir.join(name).is_dir() => {
            plain(name, Metric::ExactMatch, 64, load_split(&folder, Split::Test)?)
        }
        _ => {
            let known: Vec<&str> = KNOWN.iter().map(|t| t.name).collect();
            return Err(Error::UnknownTask {
                name: name.to_owned(),
                dir: dir.to_owned(),
                known: known.join(", "),
            });
        }
    };
    let mut task = task;
    task.documents.truncate(options.limit.unwrap_or(usize::MAX));
    task.max_new_tokens = options.max_new_tokens.unwrap_or(task.max_new_tokens);
    task.metric = options.metric.unwrap_or(task.metric);
    if task.documents.is_empty() {
        return Err(Error::NoDocuments { name: task.name });
    }
    Ok(Box::new(task))
}

fn plain(name: &str, metric: Metric, max_new_tokens: usize, data: Dataset) -> GenerationTask {
    let documents = data
        .examples
        .into_iter()
        .map(|e| Document { source: Some(e.prompt.clone()), prompt: e.prompt, reference: e.answer })
        .collect();
    GenerationTask { name: name.to_owned(), metric, documents, max_new_tokens, stop: Vec::new() }
}

/// GSM8K as lm-eval asks it: five random shots, or the eight fixed ones with chains of thought.
fn gsm8k(spec: &TaskSpec, dir: &Path) -> Result<GenerationTask, Error> {
    let home = |name: &str, file: &str| {
        [dir.join(name), dir.join("..").join(name), dir.join("../lm-eval").join(name)]
            .into_iter()
            .map(|d| d.join(file))
            .find(|f| f.is_file())
            .ok_or_else(|| Error::Io {
                path: dir.join(name).join(file),
                source: std::io::ErrorKind::NotFound.into(),
            })
    };
    let test = load(&home("gsm8k", "test.jsonl")?, Format::Gsm8k)?.examples;
    let documents = if spec.name == "gsm8k_cot" {
        let shots = chain_of_thought(&home("gsm8k_cot", "fewshot.jsonl")?)?;
        test.into_iter()
            .map(|e| {
                let question = e.prompt.trim_start_matches("Question: ").trim_end_matches("\nAnswer:");
                let gold = e.answer.rsplit("####").next().unwrap_or_default().trim().to_owned();
                Document { prompt: format!("{shots}Q: {question}\nA:"), reference: gold, source: None }
            })
            .collect()
    } else {
        let train = load(&home("gsm8k", "train.jsonl")?, Format::Gsm8k)?.examples;
        let mut random = PythonRandom::new(1234);
        let shots = 5.min(train.len());
        test.into_iter()
            .map(|e| {
                let context: String = random
                    .sample(train.len(), shots)
                    .into_iter()
                    .map(|i| format!("{}{}\n\n", train[i].prompt, train[i].answer))
                    .collect();
                Document { prompt: context + &e.prompt, reference: e.answer, source: None }
            })
            .collect()
    };
    let stop = spec.stop.iter().map(|s| (*s).to_owned()).collect();
    let (name, metric) = (spec.name.to_owned(), spec.metric);
    Ok(GenerationTask { name, metric, documents, max_new_tokens: spec.max_new_tokens, stop })
}

#[derive(Deserialize)]
struct Shot {
    question: String,
    target: String,
}

fn chain_of_thought(path: &Path) -> Result<String, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let mut shots = String::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let shot: Shot = serde_json::from_str(line).map_err(|e| Error::Question {
            path: path.to_owned(),
            line: i + 1,
            message: format!("{e}; expected {{\"question\": …, \"target\": …}}"),
        })?;
        shots += &format!("Q: {}\nA: {}\n\n", shot.question, shot.target);
    }
    Ok(shots)
}
