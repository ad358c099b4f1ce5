use std::path::{Path, PathBuf};

use cl_data::{Dataset, Example, Format, Split, load, load_split};
use serde::Deserialize;

use crate::few_shot::PythonRandom;
use crate::metrics::gsm8k::final_answer;
use crate::multiple_choice::lines;
use crate::{Document, Error, GenerationTask, Metric, MultipleChoice, Task};

/// A task that is known by name.
#[derive(Clone, Copy, Debug)]
pub struct TaskSpec {
    /// Name, which is its directory's in TRACE's layout, too.
    pub name: &'static str,
    /// Other names it answers to, in lower case.
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

/// The tasks of the paper, in its order.
///
/// Only the first character of C-STANCE, FOMC and ScienceQA answers counts (a ScienceQA answer is a letter, then an
/// explanation), so few tokens are enough there; a line of Py150 fits into 64 and a summary into 256. TRACE itself writes up to
/// 512 everywhere. 256 for GSM8K is lm-eval's default.
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
        metric: Metric::Gsm8kCot,
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

impl TaskSpec {
    /// The task of a name or alias; case does not matter.
    pub fn find(name: &str) -> Option<&'static TaskSpec> {
        let wanted = name.to_lowercase();
        KNOWN.iter().find(|t| t.name.to_lowercase() == wanted || t.aliases.contains(&wanted.as_str()))
    }
}

/// Loads a task by name or alias from a directory of tasks.
///
/// - A task of TRACE: `DIR/<Task>/test.json` (or `.jsonl`, or either with `.gz`), the directory named as the task, or as it was
///   asked for, or as one of its aliases; beside DIR when it is not in it.
/// - `gsm8k`: `DIR/gsm8k/test.jsonl` with five shots from `train.jsonl`, drawn for each document as lm-eval draws them.
/// - `gsm8k_cot`: the same questions with the shots of `gsm8k_cot/fewshot.jsonl` (or `gsm8k/fewshot.jsonl`), lines of
///   `{"question", "target"}`.
/// - Any other directory with a test file of `{"prompt", "answer"}`, scored by exact match unless `options` names a metric.
/// - A path that ends in `.jsonl`: a file of multiple-choice questions, see [`MultipleChoice::load`].
///
/// # Errors
/// [`Error::UnknownTask`], [`Error::MissingFile`], [`Error::NoDocuments`] and those of the files.
pub fn load_task(name: &str, dir: &Path, options: TaskOptions) -> Result<Box<dyn Task>, Error> {
    if name.ends_with(".jsonl") {
        let path = if Path::new(name).exists() { Path::new(name).to_owned() } else { dir.join(name) };
        return Ok(Box::new(MultipleChoice::load(&path, options.limit)?));
    }
    let mut task = match (TaskSpec::find(name), directory(name, dir)) {
        (Some(spec), _) if spec.metric == Metric::Gsm8k => gsm8k(spec, dir)?,
        (Some(spec), _) if spec.metric == Metric::Gsm8kCot => gsm8k_cot(spec, dir)?,
        (Some(spec), Some(folder)) => {
            plain(spec.name, spec.metric, spec.max_new_tokens, load_split(&folder, Split::Test)?)
        }
        (None, Some(folder)) => plain(name, Metric::ExactMatch, 64, load_split(&folder, Split::Test)?),
        (_, None) => {
            let known: Vec<&str> = KNOWN.iter().map(|t| t.name).collect();
            let (name, dir) = (name.to_owned(), dir.to_owned());
            return Err(Error::UnknownTask { name, dir, known: known.join(", ") });
        }
    };
    task.documents.truncate(options.limit.unwrap_or(usize::MAX));
    task.max_new_tokens = options.max_new_tokens.unwrap_or(task.max_new_tokens);
    task.metric = options.metric.unwrap_or(task.metric);
    if task.documents.is_empty() {
        return Err(Error::NoDocuments { name: task.name });
    }
    Ok(Box::new(task))
}

/// The directory of a task: a known one's may have any of its names and stand beside `dir`.
fn directory(name: &str, dir: &Path) -> Option<PathBuf> {
    let own = (!name.is_empty()).then(|| dir.join(name)).into_iter();
    let spec = TaskSpec::find(name);
    let names = spec.into_iter().flat_map(|s| std::iter::once(s.name).chain(s.aliases.iter().copied()));
    let known = names.flat_map(|n| [dir.join(n), dir.join("..").join(n)]);
    own.chain(known).find(|d| d.is_dir())
}

fn plain(name: &str, metric: Metric, max_new_tokens: usize, data: Dataset) -> GenerationTask {
    let documents = data
        .examples
        .into_iter()
        .map(|e| Document { source: Some(e.prompt.clone()), prompt: e.prompt, reference: e.answer })
        .collect();
    GenerationTask { name: name.to_owned(), metric, documents, max_new_tokens, stop: Vec::new() }
}

/// Number of shots and seed of lm-eval's `gsm8k`.
const SHOTS: usize = 5;
const FEW_SHOT_SEED: u32 = 1234;

/// GSM8K as lm-eval asks it: `Question: …`, `Answer:`, after five random solved questions of the training split. The shots are
/// drawn for one document after the other, so a document's prompt depends on its place in the file.
fn gsm8k(spec: &'static TaskSpec, dir: &Path) -> Result<GenerationTask, Error> {
    let test = load(&test_file(spec, dir)?, Format::Gsm8k)?.examples;
    let needed = "the five shots in front of every question are drawn from it";
    let train = load(&file(spec, dir, &["gsm8k/train.jsonl", "gsm8k/train.json"], needed)?, Format::Gsm8k)?.examples;
    let mut random = PythonRandom::new(FEW_SHOT_SEED);
    let ask = |e: Example| {
        let drawn = random.sample(train.len(), SHOTS.min(train.len())).into_iter();
        let shots: String = drawn.map(|i| format!("{}{}\n\n", train[i].prompt, train[i].answer)).collect();
        Document { prompt: shots + &e.prompt, reference: solution(&e).to_owned(), source: None }
    };
    Ok(of_spec(spec, test.into_iter().map(ask).collect()))
}

/// GSM8K as lm-eval asks it with chains of thought: `Q: …`, `A:`, after fixed shots.
fn gsm8k_cot(spec: &'static TaskSpec, dir: &Path) -> Result<GenerationTask, Error> {
    let test = load(&test_file(spec, dir)?, Format::Gsm8k)?.examples;
    let names = ["gsm8k_cot/fewshot.jsonl", "gsm8k/fewshot.jsonl"];
    let needed = "its shots, one {\"question\": …, \"target\": …} on every line, stand in front of every question";
    let path = file(spec, dir, &names, needed)?;
    let shots = lines::<Shot>(&path, r#"{"question": "…", "target": "… The answer is 7."}"#)?;
    let shots: String = shots.iter().map(|(_, s)| format!("Q: {}\nA: {}\n\n", s.question, s.target)).collect();
    let ask = |e: Example| {
        let question = e.prompt.strip_prefix("Question: ").and_then(|p| p.strip_suffix("\nAnswer:"));
        let prompt = format!("{shots}Q: {}\nA:", question.unwrap_or(&e.prompt));
        Document { prompt, reference: final_answer(solution(&e)).to_owned(), source: None }
    };
    Ok(of_spec(spec, test.into_iter().map(ask).collect()))
}

#[derive(Deserialize)]
struct Shot {
    question: String,
    target: String,
}

fn of_spec(spec: &TaskSpec, documents: Vec<Document>) -> GenerationTask {
    let stop = spec.stop.iter().map(|s| (*s).to_owned()).collect();
    let TaskSpec { metric, max_new_tokens, .. } = *spec;
    GenerationTask { name: spec.name.to_owned(), metric, documents, max_new_tokens, stop }
}

/// A GSM8K row's own answer: the training target has a space in front.
fn solution(example: &Example) -> &str {
    example.answer.strip_prefix(' ').unwrap_or(&example.answer)
}

fn test_file(spec: &'static TaskSpec, dir: &Path) -> Result<PathBuf, Error> {
    file(spec, dir, &["gsm8k/test.jsonl", "gsm8k/test.json"], "its questions are read from it")
}

/// The first of some files that exists in `dir`, beside it, or in a directory `lm-eval` beside it.
fn file(spec: &'static TaskSpec, dir: &Path, names: &[&str], needed: &'static str) -> Result<PathBuf, Error> {
    let homes = [dir.to_owned(), dir.join(".."), dir.join("../lm-eval")];
    let mut all = homes.iter().flat_map(|home| names.iter().map(move |n| home.join(n)));
    let found = all.find(|path| path.is_file());
    found.ok_or_else(|| Error::MissingFile { name: spec.name, path: dir.join(names[0]), needed })
}
