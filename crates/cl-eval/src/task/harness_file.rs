//! Task files of lm-evaluation-harness (YAML), converted to task descriptions.
//!
//! Supported are multiple choice, log-likelihoods of continuations, and generated answers compared by `exact_match`, all
//! without Python code. Everything that would change requests or scores and is not supported is an error.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_data::Row;
use regex::Regex;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::Harness;
use super::few_shot::Sampler;
use super::task_file::{
    Choices, FewShot, Files, GenerationKeys, HubDataset, LoglikelihoodKeys, MultipleChoiceKeys, TaskFile,
};
use crate::error::Error;
use crate::metrics::{ExactMatch, Metric};
use crate::problem::{HarnessProblem, shortened};

/// Maximum number of nested `include`s.
const MAX_INCLUDES: usize = 16;

/// Keys that affect neither requests nor scores here.
const WITHOUT_EFFECT: [&str; 7] = [
    "doc_to_decontamination_query",
    "generation_kwargs",
    "metadata",
    "should_decontaminate",
    "tag",
    "task_alias",
    "unsafe_code",
];

/// Marks a value that refers to Python code; the prefix cannot occur in YAML text.
const FUNCTION: &str = "\u{1}!function ";

/// Whether a path is that of a task file of lm-evaluation-harness.
pub(crate) fn is_harness_file(name: &str) -> bool {
    name.ends_with(".yaml") || name.ends_with(".yml")
}

/// Reads a task file and the files that it includes.
pub(crate) fn read(path: &Path) -> Result<TaskFile, Error> {
    let mut text = String::new();
    let keys = keys(path, 0, &mut text)?;
    let hash = blake3::hash(text.as_bytes()).to_hex().to_string();
    let file = Keys { path, keys };
    let task = TaskFile { hash, ..file.task()? };
    task.check().map_err(|(key, problem)| Error::TaskKey { path: path.to_owned(), key, problem })?;
    Ok(task)
}

/// Returns the keys of a file over those of the file that it includes, and appends the text of both to `all`.
fn keys(path: &Path, depth: usize, all: &mut String) -> Result<Map<String, Value>, Error> {
    static FUNCTIONS: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?m)!function[ \t]+([^\s#,\]}]+)").expect("a valid pattern"));
    let wrong = |key: &str, problem| Error::HarnessTask { path: path.to_owned(), key: key.to_owned(), problem };
    let text = read_text(path, MAX_CONFIG)?;
    *all += &text;
    let marked = FUNCTIONS
        .replace_all(&text, |found: &regex::Captures<'_>| json!(format!("{FUNCTION}{}", &found[1])).to_string());
    let yaml = |message: String| wrong("", HarnessProblem::Yaml { message: shortened(&message) });
    let mut own: Map<String, Value> = serde_saphyr::from_str(&marked).map_err(|e| yaml(e.to_string()))?;
    let Some(included) = own.remove("include") else { return Ok(own) };
    let Value::String(included) = included else {
        return Err(wrong("include", HarnessProblem::Expected { expected: "the path of one file" }));
    };
    if depth == MAX_INCLUDES {
        return Err(wrong("include", HarnessProblem::Expected { expected: "at most 16 files within each other" }));
    }
    let mut merged = keys(&path.parent().unwrap_or(Path::new("")).join(included), depth + 1, all)?;
    merged.extend(own);
    Ok(merged)
}

/// The keys of a task file; each is removed when it is read.
struct Keys<'a> {
    path: &'a Path,
    keys: Map<String, Value>,
}

/// The metric of a task file.
struct MetricEntry {
    metric: Metric,
    /// Its entry in `metric_list`.
    keys: Map<String, Value>,
    /// Names of the file's other metrics.
    left_out: Vec<String>,
}

/// The splits of the documents and of the few-shot examples.
struct Splits {
    eval: String,
    /// `None`: few-shot examples are drawn from the documents.
    fewshot: Option<String>,
    /// Whether the file names the split of the few-shot examples; the split then takes precedence over `samples`.
    fewshot_named: bool,
    /// Whether a document is never its own few-shot example.
    exclude_document: bool,
}

impl Keys<'_> {
    fn task(mut self) -> Result<TaskFile, Error> {
        let name = match self.keys.remove("task") {
            Some(Value::String(name)) if !self.keys.contains_key("group") => name,
            _ => return Err(self.wrong("task", HarnessProblem::Group)),
        };
        let output_type = self.text("output_type")?.unwrap_or_else(|| "generate_until".to_owned());
        let MetricEntry { metric, keys, left_out } = self.metric(&output_type)?;
        let exact_match = self.exact_match(&output_type, keys)?;
        let num_fewshot = self.number("num_fewshot")?;
        let config = match self.keys.remove("fewshot_config") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(config)) => config,
            Some(_) => return Err(self.expected("fewshot_config", "a table")),
        };
        let splits = self.splits(&config)?;
        let (sampler, mut samples) = self.shots(config)?;
        if splits.fewshot_named {
            samples.clear();
        }
        let (files, hub) = self.files(&name, &splits, !samples.is_empty())?;
        let version = self.version();
        let description = self.text("description")?.unwrap_or_default();
        let target_delimiter = self.text("target_delimiter")?.unwrap_or_else(|| " ".to_owned());
        let fewshot_delimiter = self.text("fewshot_delimiter")?.unwrap_or_else(|| "\n\n".to_owned());
        let (mut multiple_choice, mut generation, mut loglikelihood) = (None, None, None);
        match output_type.as_str() {
            "multiple_choice" => multiple_choice = Some(self.multiple_choice()?),
            "generate_until" => generation = Some(self.generation(&fewshot_delimiter, exact_match)?),
            _ => loglikelihood = Some(self.loglikelihood()?),
        }
        if self.number("repeats")?.is_some_and(|repeats| repeats != 1) {
            return Err(self.expected("repeats", "1"));
        }
        self.nothing_else()?;
        let source = match left_out.as_slice() {
            [] => "task file of lm-evaluation-harness".to_owned(),
            metrics => format!("task file of lm-evaluation-harness, without its metrics {}", metrics.join(", ")),
        };
        Ok(TaskFile {
            name,
            aliases: Vec::new(),
            source,
            version,
            metric,
            harness: Harness::LmEval,
            description,
            target_delimiter,
            fewshot_delimiter,
            files,
            hub,
            fewshot: FewShot {
                num_fewshot: num_fewshot.unwrap_or(0),
                fixed: num_fewshot == Some(0),
                sampler,
                exclude_document: Some(splits.exclude_document),
                samples,
                lm_eval: None,
            },
            multiple_choice,
            generation,
            loglikelihood,
            group: None,
            hash: String::new(),
        })
    }

    fn metric(&mut self, output_type: &str) -> Result<MetricEntry, Error> {
        let own: &[(&str, Metric)] = match output_type {
            "multiple_choice" => &[("acc_norm", Metric::AccNorm), ("acc", Metric::Acc)],
            "loglikelihood" => &[("acc", Metric::GreedyMatch), ("perplexity", Metric::GreedyMatch)],
            "generate_until" => &[("exact_match", Metric::ExactMatch)],
            other => {
                let problem = HarnessProblem::OutputType { output_type: other.to_owned() };
                return Err(self.wrong("output_type", problem));
            }
        };
        let listed = match self.keys.remove("metric_list") {
            None | Some(Value::Null) => {
                return Ok(MetricEntry { metric: own[0].1, keys: Map::new(), left_out: Vec::new() });
            }
            Some(Value::Array(listed)) => listed,
            Some(_) => return Err(self.expected("metric_list", "a list")),
        };
        let name = |entry: &Value| entry.get("metric").and_then(Value::as_str).map(|name| name.replace(FUNCTION, ""));
        let names: Vec<String> = listed.iter().filter_map(name).collect();
        let Some((known, metric)) = own.iter().find(|(known, _)| names.iter().any(|name| name == known)) else {
            let expected = match output_type {
                "loglikelihood" => "acc or perplexity",
                "generate_until" => "exact_match",
                _ => "acc or acc_norm",
            };
            return Err(self.expected("metric_list", expected));
        };
        // As in lm-eval, the last entry of a metric applies.
        let entry = listed.iter().rfind(|entry| name(entry).is_some_and(|name| name == *known));
        let keys = entry.and_then(Value::as_object).cloned().unwrap_or_default();
        let aggregations: &[&str] = if *known == "perplexity" { &["perplexity"] } else { &["mean", "nanmean"] };
        let aggregation = keys.get("aggregation").filter(|aggregation| !aggregation.is_null());
        if aggregation.is_some_and(|given| given.as_str().is_none_or(|given| !aggregations.contains(&given))) {
            let expected = if *known == "perplexity" { "the aggregation perplexity" } else { "the aggregation mean" };
            return Err(self.expected("metric_list", expected));
        }
        let left_out = names.into_iter().filter(|name| own.iter().all(|(known, _)| known != name)).collect();
        Ok(MetricEntry { metric: *metric, keys, left_out })
    }

    /// Returns the options of `exact_match`, an entry of `metric_list`, and the filters; none for tasks of another kind.
    fn exact_match(&mut self, output_type: &str, mut entry: Map<String, Value>) -> Result<ExactMatch, Error> {
        if output_type != "generate_until" {
            return Ok(ExactMatch::default());
        }
        // `hf_evaluate` selects the implementation that lm-eval's own is copied from.
        entry.retain(|key, value| {
            !matches!(key.as_str(), "metric" | "aggregation" | "higher_is_better" | "hf_evaluate") && !value.is_null()
        });
        let filters = self.keys.remove("filter_list").filter(|filters| !filters.is_null());
        let filters = filters.map_or_else(|| Ok(Vec::new()), |filters| self.parsed("filter_list", filters))?;
        let options: ExactMatch = self.parsed("metric_list", entry.into())?;
        Ok(ExactMatch { filter_list: filters, ..options })
    }

    fn parsed<T: DeserializeOwned>(&self, key: &str, value: Value) -> Result<T, Error> {
        serde_json::from_value(value).map_err(|error| {
            self.wrong(
                key,
                HarnessProblem::Value { message: shortened(&error.to_string().replace(FUNCTION, "!function ")) },
            )
        })
    }

    /// Returns the splits by lm-eval's rules.
    fn splits(&mut self, config: &Map<String, Value>) -> Result<Splits, Error> {
        let (training, validation) = (self.text("training_split")?, self.text("validation_split")?);
        let (test, given) = (self.text("test_split")?, self.text("fewshot_split")?);
        let given = config.get("split").and_then(Value::as_str).map(str::to_owned).or(given);
        let Some(eval) = test.clone().or_else(|| validation.clone()) else {
            return Err(self.expected("test_split", "the split of the documents"));
        };
        let (fewshot_named, exclude_document) = (given.is_some(), given == test);
        let fewshot = given.or(training).or(validation).filter(|split| *split != eval);
        Ok(Splits { eval, fewshot, fewshot_named, exclude_document })
    }

    fn shots(&self, mut config: Map<String, Value>) -> Result<(Sampler, Vec<Row>), Error> {
        config.remove("split");
        let sampler = match config.remove("sampler").as_ref().and_then(Value::as_str) {
            None | Some("default") => Sampler::Random,
            Some("first_n") => Sampler::FirstN,
            Some(_) => return Err(self.expected("fewshot_config.sampler", "default or first_n")),
        };
        let samples = match config.remove("samples") {
            None | Some(Value::Null) => Vec::new(),
            Some(samples) => serde_json::from_value(samples)
                .map_err(|_| self.expected("fewshot_config.samples", "a list of rows"))?,
        };
        match config.into_iter().find(|(_, value)| !value.is_null()) {
            Some((key, value)) => Err(self.unsupported(&format!("fewshot_config.{key}"), &value)),
            None => Ok((sampler, samples)),
        }
    }

    /// Returns the files of the documents and few-shot examples: local files, or the directory or Hub data set
    /// `dataset_path`.
    fn files(&mut self, task: &str, splits: &Splits, has_samples: bool) -> Result<(Files, Option<HubDataset>), Error> {
        let Some(dataset) = self.text("dataset_path")? else {
            return Err(self.expected("dataset_path", "a data set of the Hub, a directory, or json with data_files"));
        };
        let config = self.text("dataset_name")?;
        let arguments = self.keys.remove("dataset_kwargs").unwrap_or_default();
        let fewshot = splits.fewshot.as_ref().filter(|_| !has_samples);
        if matches!(dataset.as_str(), "csv" | "text") {
            // Their loaders guess types, or split texts, by rules of their own.
            return Err(self.expected("dataset_path", "json or parquet: convert the files to JSON Lines"));
        }
        if matches!(dataset.as_str(), "json" | "parquet") {
            let of = |split: &str| {
                let data_files = arguments.get("data_files");
                let file = match data_files {
                    Some(Value::Object(by_split)) => by_split.get(split),
                    // Without splits, all files are the split `train`.
                    other => other.filter(|_| split == "train"),
                };
                let single = |file: &Value| match file {
                    Value::String(file) => Some(found(file)),
                    Value::Array(files) if files.len() == 1 => files[0].as_str().map(found),
                    _ => None,
                };
                let expected = "the path of one file for each split, such as {test: test.jsonl}";
                file.and_then(single).ok_or_else(|| self.expected("dataset_kwargs.data_files", expected))
            };
            let fewshot = fewshot.map(|split| of(split)).transpose()?.into_iter().collect();
            return Ok((Files { eval: vec![of(&splits.eval)?], fewshot, ..Files::default() }, None));
        }
        let own = Path::new(&dataset).is_dir();
        let short = dataset.rsplit('/').next().unwrap_or(&dataset);
        let homes = if own { vec![dataset.as_str()] } else { vec![task, short] };
        let names = |split: &String| homes.iter().map(|home| format!("{home}/{split}")).collect::<Vec<_>>();
        let files =
            Files { eval: names(&splits.eval), fewshot: fewshot.map(names).unwrap_or_default(), ..Files::default() };
        let hub =
            HubDataset { repo: dataset.clone(), config, split: splits.eval.clone(), fewshot_split: fewshot.cloned() };
        Ok((files, (!own).then_some(hub)))
    }

    fn multiple_choice(&mut self) -> Result<MultipleChoiceKeys, Error> {
        let context = self.template("doc_to_text")?;
        let choices = match self.keys.remove("doc_to_choice") {
            Some(Value::Array(choices)) => self.literal_choices(choices.into_iter())?,
            Some(Value::Object(choices)) => self.literal_choices(choices.into_iter().map(|(_, choice)| choice))?,
            Some(Value::String(text)) if is_field(&text) => Choices::Expression(text),
            Some(Value::String(text)) => Choices::Expression(self.expression("doc_to_choice", &text)?),
            Some(other) => return Err(self.unsupported("doc_to_choice", &other)),
            None => return Err(self.expected("doc_to_choice", "the choices")),
        };
        let gold = match self.keys.remove("doc_to_target") {
            Some(Value::Number(index)) => index.to_string(),
            Some(Value::String(text)) if is_field(&text) => field_or_text(&text),
            Some(Value::String(text)) if text.parse::<usize>().is_ok() => text,
            Some(Value::String(text)) if is_plain(&text) => json!(text).to_string(),
            Some(Value::String(text)) => format!("({}) | lm_eval_target", self.expression("doc_to_target", &text)?),
            Some(other) => return Err(self.unsupported("doc_to_target", &other)),
            None => return Err(self.expected("doc_to_target", "the right choice")),
        };
        Ok(MultipleChoiceKeys {
            context: Some(context),
            choices: Some(choices),
            contexts: None,
            continuation: None,
            gold: Some(gold),
            labels: None,
        })
    }

    fn generation(&mut self, fewshot_delimiter: &str, exact_match: ExactMatch) -> Result<GenerationKeys, Error> {
        let prompt = self.template("doc_to_text")?;
        let (target, targets) = match self.keys.remove("doc_to_target") {
            Some(Value::String(text)) if is_field(&text) => (None, Some(field_or_text(&text))),
            Some(Value::String(text)) if is_odd_field(&text) => return Err(self.expected("doc_to_target", FIELD)),
            Some(Value::String(text)) if !text.starts_with(FUNCTION) => (Some(text), None),
            Some(Value::Number(number)) => (Some(number.to_string()), None),
            Some(other) => return Err(self.unsupported("doc_to_target", &other)),
            None => return Err(self.expected("doc_to_target", "the right answer")),
        };
        let (stop, max_new_tokens) = self.decoding(fewshot_delimiter)?;
        let exact_match = Some(exact_match);
        Ok(GenerationKeys { prompt, target, targets, target_may_be_a_list: true, exact_match, stop, max_new_tokens })
    }

    /// Returns the stop sequences and the maximum number of new tokens.
    fn decoding(&mut self, fewshot_delimiter: &str) -> Result<(Vec<String>, usize), Error> {
        let mut kwargs = match self.keys.remove("generation_kwargs") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(kwargs)) => kwargs,
            Some(_) => return Err(self.expected("generation_kwargs", "a table")),
        };
        let stop = match kwargs.remove("until") {
            None => vec![fewshot_delimiter.to_owned()],
            Some(Value::String(stop)) => vec![stop],
            Some(Value::Null) => Vec::new(),
            Some(stops) => self.parsed("generation_kwargs.until", stops)?,
        };
        let mut max_new_tokens = None;
        for key in ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"] {
            let Some(value) = kwargs.remove(key).filter(|value| !value.is_null()) else { continue };
            let Some(number) = value.as_u64().filter(|number| *number > 0) else {
                return Err(self.expected(&format!("generation_kwargs.{key}"), "an integer from 1"));
            };
            max_new_tokens = max_new_tokens.or(Some(number as usize)); // the first wins, as in lm-eval
        }
        let temperature = match kwargs.remove("temperature").filter(|value| !value.is_null()) {
            None => 0.0,
            Some(value) => value
                .as_f64()
                .or_else(|| value.as_str()?.parse().ok())
                .ok_or_else(|| self.expected("generation_kwargs.temperature", "a number"))?,
        };
        let samples = kwargs.remove("do_sample").and_then(|value| value.as_bool()).unwrap_or(temperature > 0.0);
        if samples {
            return Err(self.expected("generation_kwargs.do_sample", "false: answers are decoded greedily"));
        }
        // Without sampling, these change nothing.
        kwargs.retain(|key, value| {
            let beams = key == "num_beams" && *value == 1;
            !value.is_null() && !beams && !matches!(key.as_str(), "top_p" | "top_k")
        });
        match kwargs.into_iter().next() {
            Some((key, value)) => Err(self.unsupported(&format!("generation_kwargs.{key}"), &value)),
            None => Ok((stop, max_new_tokens.unwrap_or(256))),
        }
    }

    fn loglikelihood(&mut self) -> Result<LoglikelihoodKeys, Error> {
        let (context, continuation) = (self.template("doc_to_text")?, self.template("doc_to_target")?);
        Ok(LoglikelihoodKeys { context, continuation })
    }

    /// Returns choices that are used as they are, without rendering.
    fn literal_choices(&self, choices: impl Iterator<Item = Value>) -> Result<Choices, Error> {
        let literal = |choice: Value| match choice {
            Value::String(text) if text.contains('{') => Ok(format!("{{% raw %}}{text}{{% endraw %}}")),
            Value::String(text) => Ok(text),
            _ => Err(self.expected("doc_to_choice", "a list of texts")),
        };
        choices.map(literal).collect::<Result<_, _>>().map(Choices::Templates)
    }

    /// Returns a template: a text without braces is the name of a field if the row has it.
    fn template(&mut self, key: &str) -> Result<String, Error> {
        match self.keys.remove(key) {
            Some(Value::String(text)) if is_field(&text) => Ok(format!("{{{{ {} }}}}", field_or_text(&text))),
            Some(Value::String(text)) if is_odd_field(&text) => Err(self.expected(key, FIELD)),
            Some(Value::String(text)) if !text.starts_with(FUNCTION) => Ok(text),
            Some(other) => Err(self.unsupported(key, &other)),
            None => Err(self.expected(key, "a template")),
        }
    }

    /// Returns the expression of a template that consists of one.
    fn expression(&self, key: &str, template: &str) -> Result<String, Error> {
        let inner = template.trim().strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}"));
        match inner.filter(|inner| !["{{", "}}", "{%"].iter().any(|mark| inner.contains(mark))) {
            Some(inner) => Ok(inner.trim_matches('-').trim().to_owned()),
            None if template.starts_with(FUNCTION) => Err(self.unsupported(key, &json!(template))),
            None => Err(self.expected(key, "a field, or a template of one expression in {{ }}")),
        }
    }

    /// Removes and returns a text; `None` if it is absent or null.
    fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.keys.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if !text.starts_with(FUNCTION) => Ok(Some(text)),
            Some(other) => Err(self.unsupported(key, &other)),
        }
    }

    fn number(&mut self, key: &str) -> Result<Option<usize>, Error> {
        match self.keys.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) => Ok(Some(number as usize)),
                None => Err(self.expected(key, "an integer from 0")),
            },
        }
    }

    /// Returns the integer part of `metadata.version`; 1 if it is absent or no number.
    fn version(&self) -> u32 {
        let version = self.keys.get("metadata").and_then(|metadata| metadata.get("version"));
        let number = version.and_then(|v| v.as_f64().or_else(|| v.as_str()?.parse().ok()));
        number.filter(|n| (0.0..1e9).contains(n)).map_or(1, |n| n as u32)
    }

    fn nothing_else(&self) -> Result<(), Error> {
        let has_effect = |(key, value): &(&String, &Value)| !WITHOUT_EFFECT.contains(&key.as_str()) && !value.is_null();
        match self.keys.iter().find(has_effect) {
            Some((key, value)) => Err(self.unsupported(key, value)),
            None => Ok(()),
        }
    }

    fn unsupported(&self, key: &str, value: &Value) -> Error {
        let function = value.as_str().and_then(|text| text.strip_prefix(FUNCTION));
        let problem =
            function.map_or(HarnessProblem::Unsupported, |f| HarnessProblem::Function { function: f.to_owned() });
        self.wrong(key, problem)
    }

    fn expected(&self, key: &str, expected: &'static str) -> Error {
        self.wrong(key, HarnessProblem::Expected { expected })
    }

    fn wrong(&self, key: &str, problem: HarnessProblem) -> Error {
        Error::HarnessTask { path: self.path.to_owned(), key: key.to_owned(), problem }
    }
}

/// Returns a path relative to the current directory as an absolute one, if the file exists there.
fn found(file: &str) -> String {
    let absolute = std::path::absolute(file).unwrap_or_else(|_| PathBuf::from(file));
    if absolute.is_file() { absolute.to_string_lossy().into_owned() } else { file.to_owned() }
}

/// Whether a text can be the name of a field.
fn is_field(text: &str) -> bool {
    const WORDS: [&str; 12] = ["and", "else", "false", "False", "if", "in", "is", "none", "None", "not", "or", "true"];
    let mut characters = text.chars();
    characters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !WORDS.contains(&text)
}

/// What a field or template must be.
const FIELD: &str = "the name of a field, in ASCII letters, digits and underscores, or a template";

/// Whether a text may be the name of a field that no template can name, such as `Best Answer`. lm-eval uses such a field
/// if the row has it.
fn is_odd_field(text: &str) -> bool {
    is_plain(text) && text.chars().any(char::is_alphabetic)
}

/// An expression for the field of a name, or the name itself if the row has no such field.
fn field_or_text(name: &str) -> String {
    format!("{name} if {name} is defined else '{name}'")
}

/// Whether a text contains nothing to render.
fn is_plain(text: &str) -> bool {
    !text.starts_with(FUNCTION) && !["{{", "{%", "{#"].iter().any(|mark| text.contains(mark))
}
