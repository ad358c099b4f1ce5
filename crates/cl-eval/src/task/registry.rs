use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use cl_checkpoint::files::{MAX_CONFIG, read_file, read_text};
use cl_data::{DatasetRef, Example, Row, Split, load_split};
use serde_json::{Map, Value, json};

use super::Task;
use super::described::{Material, build};
use super::group::TaskGroup;
use super::harness_file::{self, is_harness_file};
use super::lm_eval::lm_eval_samples;
use super::multiple_choice::MultipleChoice;
use super::options::TaskOptions;
use super::rows::{Document, Library, Rows, task_homes};
use super::task_file::{HubDataset, TaskFile};
use super::template::Template;
use crate::error::Error;
use crate::metrics::Metric;
use crate::problem::{KeyProblem, Need, TemplateProblem};

/// A built-in task.
#[derive(Clone, Copy, Debug)]
pub struct TaskSpec {
    /// Name, which is also the name of its directory in TRACE's layout.
    pub name: &'static str,
    /// Other names, in lower case.
    pub aliases: &'static [&'static str],
    /// The metric used to score answers.
    pub metric: Metric,
    /// Default maximum number of new tokens; 0 for multiple choice.
    pub max_new_tokens: usize,
    /// Stop sequences.
    pub stop: &'static [&'static str],
    /// Name of its data set on the Hub; tasks may share one.
    pub dataset: Option<&'static str>,
}

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$((concat!("tasks/", $name, ".toml"), include_str!(concat!("../../tasks/", $name, ".toml")))),*]
    };
}

/// The built-in descriptions: the paper's tasks first, in its order.
///
/// Only the first character of C-STANCE, FOMC and ScienceQA answers is scored (a ScienceQA answer is a letter followed
/// by an explanation), so few tokens are enough for them; a line of Py150 fits into 64 tokens and a summary into 256.
/// TRACE generates up to 512 tokens for all tasks. 256 for GSM8K is lm-eval's default.
const EMBEDDED: [(&str, &str); 30] = embedded![
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "20Minuten",
    "gsm8k",
    "gsm8k_cot",
    "mmlu",
    "arc_challenge",
    "commonsense_qa",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "dbpedia",
    "amazon",
    "yahoo",
    "agnews",
    "arc_easy",
    "boolq",
    "copa",
    "logiqa",
    "mathqa",
    "rte",
    "sciq",
    "social_iqa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "lambada_openai",
];

static FILES: LazyLock<Vec<TaskFile>> = LazyLock::new(|| {
    let parse = |(path, text): (&str, &str)| TaskFile::parse(text, Path::new(path));
    EMBEDDED.into_iter().map(|file| parse(file).unwrap_or_else(|e| panic!("{e}"))).collect()
});

static SPECS: LazyLock<Vec<TaskSpec>> = LazyLock::new(|| {
    let leaked = |texts: &'static [String]| &*Vec::leak(texts.iter().map(String::as_str).collect());
    let spec = |file: &'static TaskFile| TaskSpec {
        name: &file.name,
        aliases: leaked(&file.aliases),
        metric: file.metric,
        max_new_tokens: file.generation.as_ref().map_or(0, |g| g.max_new_tokens),
        stop: file.generation.as_ref().map_or(&[], |g| leaked(&g.stop)),
        dataset: file.hub.as_ref().map(|hub| hub.repo.as_str()),
    };
    FILES.iter().map(spec).collect()
});

/// Returns the built-in tasks. `mmlu` is a group.
pub fn known_tasks() -> &'static [TaskSpec] {
    &SPECS
}

impl TaskSpec {
    /// Finds a task by name or alias, ignoring case.
    pub fn find(name: &str) -> Option<&'static TaskSpec> {
        let wanted = name.to_lowercase();
        SPECS.iter().find(|t| t.name.to_lowercase() == wanted || t.aliases.contains(&wanted.as_str()))
    }
}

/// The tasks that a name refers to.
pub struct TaskSet {
    /// One task, or all of a group.
    pub tasks: Vec<Box<dyn Task>>,
    /// Groups of these tasks; empty for a single task.
    pub groups: Vec<TaskGroup>,
}

/// Loads a task by name or alias from a data directory. `name` is one of:
///
/// - A built-in task. The files named in its description are searched for in the directories of [`task_homes`]; then on
///   the Hub, if `options` has one and the description names a data set. A TRACE task is
///   `dir/<Task>/test.json` (or `.jsonl`, or either with `.gz`), where the directory has the task's name, the requested
///   name, or an alias.
/// - A path that ends in `.toml`: a task description. Its files are also searched for next to it.
/// - A path that ends in `.yaml` or `.yml`: a task file of lm-evaluation-harness, of multiple choice or of a continuation
///   (`output_type: loglikelihood`), without Python code. Files named in it are searched for like those of a description.
/// - A path that ends in `.jsonl`: multiple-choice questions, see [`MultipleChoice::load`].
/// - Any other directory in `dir` with a test file of `{"prompt", "answer"}`, scored by exact match unless `options`
///   names a metric.
///
/// # Errors
/// Returns [`Error::UnknownTask`], [`Error::NoTaskDirectory`], [`Error::IsGroup`], [`Error::MissingFile`] or [`Error::Fetch`] if the task or its
/// files are not found, [`Error::NoDocuments`] or [`Error::Shots`] if there are too few rows, [`Error::Chat`] if the
/// chat template fails, and an error if the description or a file is invalid.
pub fn load_task(name: &str, dir: &Path, options: TaskOptions<'_>) -> Result<Box<dyn Task>, Error> {
    let mut set = load(name, dir, options, true)?;
    Ok(set.tasks.swap_remove(0))
}

/// Loads a task like [`load_task`], or all tasks of a group: `mmlu`, or a subgroup such as `mmlu_stem`.
///
/// # Errors
/// Returns the same errors as [`load_task`], except [`Error::IsGroup`].
pub fn load_tasks(name: &str, dir: &Path, options: TaskOptions<'_>) -> Result<TaskSet, Error> {
    load(name, dir, options, false)
}

fn load(name: &str, dir: &Path, options: TaskOptions<'_>, single: bool) -> Result<TaskSet, Error> {
    let one = |task| Ok(TaskSet { tasks: vec![task], groups: Vec::new() });
    let given = || if Path::new(name).exists() { PathBuf::from(name) } else { dir.join(name) };
    if name.ends_with(".jsonl") {
        return one(questions(&given(), options)?);
    }
    if name.ends_with(".toml") {
        let path = given();
        let text = read_text(&path, MAX_CONFIG)?;
        let file = TaskFile::parse(&text, &path)?;
        let mut library = Library::new(dir, path.parent(), options.hub);
        // A missing file is expected to be next to the description.
        let home = path.parent().filter(|home| !home.as_os_str().is_empty()).unwrap_or(dir);
        return if file.group.is_some() {
            members(&file, &file.name, library, home, options, single)
        } else {
            one(load_described(&file, &file.name, None, &mut library, home, options)?)
        };
    }
    if is_harness_file(name) {
        let path = given();
        let file = harness_file::read(&path)?;
        let mut library = Library::new(dir, path.parent(), options.hub);
        return one(load_described(&file, &file.name, None, &mut library, dir, options)?);
    }
    let mut library = Library::new(dir, None, options.hub);
    let wanted = name.to_lowercase();
    let known = FILES.iter().find(|f| f.name.to_lowercase() == wanted || f.aliases.contains(&wanted));
    match known {
        Some(file) if file.group.is_none() => one(load_described(file, name, None, &mut library, dir, options)?),
        Some(file) => members(file, &file.name, library, dir, options, single),
        None => match FILES.iter().find(|f| f.group.is_some() && wanted.starts_with(&format!("{}_", f.name))) {
            Some(file) => members(file, &wanted, library, dir, options, single),
            None => one(plain(name, dir, options)?),
        },
    }
}

/// Returns the tasks of a group or subgroup, or a single member.
fn members(
    file: &TaskFile,
    wanted: &str,
    mut library: Library<'_>,
    dir: &Path,
    options: TaskOptions<'_>,
    single: bool,
) -> Result<TaskSet, Error> {
    let group = file.group.as_ref().expect("only called for groups");
    let full = |part: &str| format!("{}_{part}", file.name);
    let named = |ids: &[String]| ids.iter().map(|m| full(m)).collect::<Vec<_>>();
    let version = group.version;
    let parts: Vec<TaskGroup> =
        group.members.iter().map(|(part, ids)| TaskGroup { name: full(part), version, members: named(ids) }).collect();
    let mut all: Vec<String> = parts.iter().flat_map(|p| p.members.clone()).collect();
    all.sort_unstable();
    let groups: Vec<TaskGroup> = if wanted == file.name {
        [TaskGroup { name: file.name.clone(), version, members: all }].into_iter().chain(parts).collect()
    } else {
        parts.into_iter().filter(|p| p.name == wanted).collect()
    };
    let names = match groups.first() {
        Some(group) => group.members.clone(),
        None => vec![wanted.to_owned()],
    };
    if let (true, Some(group)) = (single, groups.first()) {
        let (name, members, first) = (group.name.clone(), group.members.len(), group.members[0].clone());
        return Err(Error::IsGroup { name, members, first });
    }
    if groups.is_empty() && !group.members.values().flatten().any(|m| full(m) == wanted) {
        return Err(unknown(wanted, dir));
    }
    let limit = options.group_limit.map(|all| all.div_ceil(names.len())).or(options.limit);
    let options = TaskOptions { limit, ..options };
    let mut tasks: Vec<Box<dyn Task>> = Vec::new();
    for name in &names {
        let id = &name[file.name.len() + 1..];
        tasks.push(load_described(file, name, Some((&group.field, id)), &mut library, dir, options)?);
    }
    Ok(TaskSet { tasks, groups })
}

/// A requested task. `member` is the field that selects the rows of a group member, and its value.
#[derive(Clone, Copy)]
struct RequestedTask<'a> {
    file: &'a TaskFile,
    name: &'a str,
    member: Option<(&'a str, &'a str)>,
    dir: &'a Path,
}

fn load_described(
    file: &TaskFile,
    name: &str,
    member: Option<(&str, &str)>,
    library: &mut Library<'_>,
    dir: &Path,
    options: TaskOptions<'_>,
) -> Result<Box<dyn Task>, Error> {
    let requested = RequestedTask { file, name, member, dir };
    let rows = requested.rows(library)?;
    let (values, mut files) = requested.values(library)?;
    files.push(rows.settings());
    let mut documents = documents(&rows, member);
    let available = documents.len();
    documents.truncate(options.limit.unwrap_or(usize::MAX));
    let shots = file.fewshot.shots(options.num_fewshot);
    let pool = if shots > 0 { requested.pool(shots, &rows, library, &options, &mut files)? } else { Vec::new() };
    let material = Material { name: requested.task().to_owned(), documents, available, pool, values, files };
    Ok(Box::new(build(file, material, &options)?))
}

impl RequestedTask<'_> {
    /// Returns the name of the task.
    fn task(&self) -> &str {
        if self.member.is_some() { self.name } else { &self.file.name }
    }

    /// Returns candidate file names for each of the task's names, the requested name first.
    fn candidates(&self, patterns: &[String]) -> Result<Vec<String>, Error> {
        let aliases = self.file.aliases.iter().map(String::as_str);
        let mut filled: Vec<String> = Vec::new();
        for name in [self.name, &self.file.name].into_iter().chain(aliases) {
            for pattern in patterns {
                let candidate = self.fill("files", pattern, name)?;
                if !filled.contains(&candidate) {
                    filled.push(candidate);
                }
            }
        }
        Ok(filled)
    }

    /// Renders a file name with the variables `name` and the group's field.
    fn fill(&self, key: &'static str, pattern: &str, name: &str) -> Result<String, Error> {
        let row: BTreeMap<String, String> =
            [("name", name)].into_iter().chain(self.member).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let wrong = |problem: TemplateProblem| Error::TaskKey {
            path: PathBuf::from(&self.file.name),
            key,
            problem: KeyProblem::Template(problem),
        };
        Template::new(pattern).and_then(|t| t.render(&row.into())).map_err(wrong)
    }

    /// Returns the path of the first candidate, for error messages.
    fn expected(&self, names: &[String]) -> PathBuf {
        self.dir.join(format!("{}.jsonl", names.first().map_or("", String::as_str)))
    }

    fn missing(&self, names: &[String], needed: Need, dataset: Option<DatasetRef>) -> Error {
        let (name, path) = (self.task().to_owned(), self.expected(names));
        Error::MissingFile { name, path, needed, dataset: dataset.map(|d| d.repo) }
    }

    /// Returns the Hub data set with the same rows, if the description has one with this split.
    fn dataset(&self, split: impl Fn(&HubDataset) -> Option<&String>) -> Result<Option<DatasetRef>, Error> {
        let Some((hub, split)) = self.file.hub.as_ref().and_then(|hub| Some((hub, split(hub)?))) else {
            return Ok(None);
        };
        let config = hub.config.as_ref().map(|c| self.fill("hub.config", c, &self.file.name)).transpose()?;
        Ok(Some(DatasetRef { config, ..DatasetRef::new(&hub.repo, split) }))
    }

    /// Returns the rows of a local file, or else of the Hub data set.
    fn find_rows(
        &self,
        library: &mut Library<'_>,
        names: &[String],
        dataset: Option<&DatasetRef>,
    ) -> Result<Option<Rows>, Error> {
        let local = library.local(names)?;
        let (None, Some(dataset)) = (&local, dataset) else { return Ok(local) };
        library.fetch(dataset).map_err(|source| {
            let (name, path, source) = (self.task().to_owned(), self.expected(names), Box::new(source));
            Error::Fetch { name, path, dataset: Box::new(dataset.clone()), source }
        })
    }

    /// Returns the rows of the documents.
    fn rows(&self, library: &mut Library<'_>) -> Result<Rows, Error> {
        let names = self.candidates(&self.file.files.eval)?;
        let dataset = self.dataset(|hub| Some(&hub.split))?;
        if let Some(rows) = self.find_rows(library, &names, dataset.as_ref())? {
            return Ok(rows);
        }
        let in_own_directory = self.file.files.eval[0].starts_with("{{ name }}/");
        let mut paths = task_homes(self.dir).into_iter().flat_map(|home| names.iter().map(move |c| home.join(c)));
        if in_own_directory && !paths.any(|path| path.parent().is_some_and(Path::is_dir)) {
            return Err(Error::NoTaskDirectory { name: self.file.name.clone(), dir: self.dir.to_owned() });
        }
        Err(self.missing(&names, Need::Documents, dataset))
    }

    /// Returns template variables that are the same for every row, and the files they were read from.
    fn values(&self, library: &Library<'_>) -> Result<(Map<String, Value>, Vec<Value>), Error> {
        let mut values: Map<String, Value> = Map::new();
        let mut files = Vec::new();
        if let Some((field, id)) = self.member {
            values.insert(field.to_owned(), json!(id));
        }
        for (key, patterns) in &self.file.files.values {
            let names = self.candidates(patterns)?;
            let needed = || self.missing(&names, Need::Variable { key: key.clone() }, None);
            let path = library.find(&names).ok_or_else(needed)?;
            let bytes = read_file(&path, MAX_CONFIG)?;
            let value =
                serde_json::from_slice(&bytes).map_err(|source| Error::Values { path: path.clone(), source })?;
            values.insert(key.clone(), value);
            files.push(json!({ "path": path, "blake3": blake3::hash(&bytes).to_hex().to_string() }));
        }
        Ok((values, files))
    }

    /// Returns the rows from which few-shot examples are drawn.
    fn pool(
        &self,
        shots: usize,
        own: &Rows,
        library: &mut Library<'_>,
        options: &TaskOptions<'_>,
        files: &mut Vec<Value>,
    ) -> Result<Vec<Document>, Error> {
        let samples = &self.file.fewshot.samples;
        if !samples.is_empty() {
            let path = PathBuf::from(self.task());
            let sample = |(index, row): (usize, &Row)| Document { path: path.clone(), index, row: row.clone() };
            return Ok(samples.iter().enumerate().map(sample).collect());
        }
        if self.file.files.fewshot.is_empty() {
            return Ok(documents(own, self.member));
        }
        let names = self.candidates(&self.file.files.fewshot)?;
        let dataset = self.dataset(|hub| hub.fewshot_split.as_ref())?;
        let found = self.find_rows(library, &names, dataset.as_ref())?;
        if let (None, Some(yaml)) = (&found, &self.file.fewshot.lm_eval) {
            let missing = || Error::LmEvalShots { name: self.task().to_owned(), path: self.expected(&names) };
            let samples = lm_eval_samples(options.lm_eval.ok_or_else(missing)?, yaml)?;
            files.push(json!({ "path": samples.path, "blake3": samples.hash }));
            return Ok(samples.documents());
        }
        let rows = found.ok_or_else(|| self.missing(&names, Need::Shots { shots }, dataset))?;
        files.push(rows.settings());
        Ok(documents(&rows, self.member))
    }
}

/// Returns the rows of a file, or those of one group member in a shared file.
fn documents(rows: &Rows, member: Option<(&str, &str)>) -> Vec<Document> {
    let own = |row: &Row| member.is_none_or(|(field, id)| row.get(field).is_none_or(|v| v == id));
    let document = |(index, row): (usize, &Row)| Document { path: rows.path.clone(), index, row: row.clone() };
    rows.file.rows.iter().enumerate().filter(|(_, row)| own(row)).map(document).collect()
}

fn unknown(name: &str, dir: &Path) -> Error {
    let known: Vec<&str> = SPECS.iter().map(|t| t.name).collect();
    Error::UnknownTask { name: name.to_owned(), dir: dir.to_owned(), known }
}

/// Loads a directory of examples, in any format supported for training.
fn plain(name: &str, dir: &Path, options: TaskOptions<'_>) -> Result<Box<dyn Task>, Error> {
    const DESCRIPTION: &str = r#"
        name = "directory"
        metric = "exact_match"
        target_delimiter = ""
        files.eval = ["test"]
        fewshot.exclude_document = false
        generation = { prompt = "{{ prompt }}", target = "{{ answer }}", max_new_tokens = 64 }
    "#;
    let folder = dir.join(name);
    if name.is_empty() || !folder.is_dir() {
        return Err(unknown(name, dir));
    }
    let file = TaskFile::parse(DESCRIPTION, Path::new("directory"))?;
    let mut files = Vec::new();
    let mut read = |split| -> Result<Vec<Document>, Error> {
        let data = load_split(&folder, split)?;
        files.push(json!({ "path": data.path, "blake3": data.hash }));
        let document = |(index, example): (usize, Example)| match example {
            Example::Pair { prompt, answer } => {
                let row = [("prompt".to_owned(), json!(prompt)), ("answer".to_owned(), json!(answer))];
                Ok(Document { path: data.path.clone(), index, row: row.into_iter().collect() })
            }
            Example::Chat { .. } => Err(Error::Conversation { path: data.path.clone(), row: index }),
        };
        data.examples.into_iter().enumerate().map(document).collect()
    };
    let mut documents = read(Split::Test)?;
    let available = documents.len();
    documents.truncate(options.limit.unwrap_or(usize::MAX));
    let pool = if options.num_fewshot.unwrap_or(0) > 0 { read(Split::Train)? } else { Vec::new() };
    let material = Material { name: name.to_owned(), documents, available, pool, values: Map::new(), files };
    Ok(Box::new(build(&file, material, &options)?))
}

/// Loads a file of questions. Few-shot examples are other questions in the file.
fn questions(path: &Path, options: TaskOptions<'_>) -> Result<Box<dyn Task>, Error> {
    const DESCRIPTION: &str = r#"
        name = "questions"
        metric = "acc"
        files.eval = ["questions"]
        fewshot.exclude_document = true
        multiple_choice = { context = "{{ query }}", choices = "choices", gold = "gold" }
    "#;
    let checked = MultipleChoice::load(path, None)?;
    let file = TaskFile::parse(DESCRIPTION, Path::new("questions"))?;
    let rows = cl_data::read_rows(path)?;
    let all =
        || rows.rows.iter().enumerate().map(|(index, row)| Document { path: path.to_owned(), index, row: row.clone() });
    let documents = all().take(options.limit.unwrap_or(usize::MAX)).collect();
    let files = vec![json!({ "path": path, "blake3": rows.hash })];
    let (name, available) = (checked.name().to_owned(), rows.rows.len());
    let material = Material { name, documents, available, pool: all().collect(), values: Map::new(), files };
    Ok(Box::new(build(&file, material, &options)?))
}
