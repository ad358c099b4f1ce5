//! Task descriptions: TOML files that define where a task's rows are and how they become requests.
//!
//! The built-in descriptions are in `crates/cl-eval/tasks`; all keys are documented in `docs/formats.md`.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use cl_data::Row;
use serde::Deserialize;

use super::Harness;
use super::few_shot::Sampler;
use super::template::{Formula, Template};
use crate::error::Error;
use crate::metrics::{ExactMatch, Filter, FilterPipeline, Metric};
use crate::problem::KeyProblem;

/// An invalid key of a description, and what is wrong with its value.
pub(crate) type Wrong = (&'static str, KeyProblem);

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TaskFile {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) aliases: Vec<String>,
    /// Origin of the task and its prompt.
    #[serde(default)]
    pub(crate) source: String,
    /// Version of the task, as in lm-evaluation-harness.
    #[serde(default = "one")]
    pub(crate) version: u32,
    pub(crate) metric: Metric,
    #[serde(default)]
    pub(crate) harness: Harness,
    /// Template of the text before the few-shot examples.
    #[serde(default)]
    pub(crate) description: String,
    #[serde(default = "space")]
    pub(crate) target_delimiter: String,
    #[serde(default = "blank_line")]
    pub(crate) fewshot_delimiter: String,
    pub(crate) files: Files,
    pub(crate) hub: Option<HubDataset>,
    #[serde(default)]
    pub(crate) fewshot: FewShot,
    pub(crate) multiple_choice: Option<MultipleChoiceKeys>,
    pub(crate) generation: Option<GenerationKeys>,
    pub(crate) loglikelihood: Option<LoglikelihoodKeys>,
    pub(crate) group: Option<GroupKeys>,
    /// blake3 hash of the file.
    #[serde(skip)]
    pub(crate) hash: String,
}

/// Candidate file names, without extension; the first that exists is read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Files {
    pub(crate) eval: Vec<String>,
    #[serde(default)]
    pub(crate) fewshot: Vec<String>,
    /// JSON files whose contents become template variables.
    #[serde(default)]
    pub(crate) values: BTreeMap<String, Vec<String>>,
}

/// The Hub data set with the same rows.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HubDataset {
    pub(crate) repo: String,
    pub(crate) config: Option<String>,
    pub(crate) split: String,
    pub(crate) fewshot_split: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct FewShot {
    pub(crate) num_fewshot: usize,
    /// Whether a requested number of examples is ignored.
    pub(crate) fixed: bool,
    pub(crate) sampler: Sampler,
    /// See [`TaskFile::excludes_document`].
    pub(crate) exclude_document: Option<bool>,
    /// Few-shot examples given in the description itself instead of a file.
    pub(crate) samples: Vec<Row>,
    /// Path of the task file with the few-shot examples, within the lm-eval package.
    pub(crate) lm_eval: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MultipleChoiceKeys {
    pub(crate) context: Option<String>,
    pub(crate) choices: Option<Choices>,
    pub(crate) contexts: Option<Choices>,
    pub(crate) continuation: Option<String>,
    pub(crate) gold: Option<String>,
    pub(crate) labels: Option<String>,
}

impl TaskFile {
    /// Whether a document is never its own few-shot example. If the examples are drawn from the documents themselves, it
    /// would otherwise show its answer; for tasks of lm-eval, only what the description says applies.
    pub(crate) fn excludes_document(&self) -> bool {
        let of_documents = self.fewshot.samples.is_empty() && self.files.fewshot.is_empty();
        self.fewshot.exclude_document.unwrap_or(of_documents && self.harness != Harness::LmEval)
    }
}

impl FewShot {
    /// Returns the number of examples for each document.
    pub(crate) fn shots(&self, requested: Option<usize>) -> usize {
        requested.filter(|_| !self.fixed).unwrap_or(self.num_fewshot)
    }
}

/// A list of templates, or an expression that evaluates to a list of strings.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Choices {
    Templates(Vec<String>),
    Expression(String),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GenerationKeys {
    pub(crate) prompt: String,
    pub(crate) target: Option<String>,
    pub(crate) targets: Option<String>,
    /// Whether a rendered target that is a Python list is a list of right answers, as in lm-eval.
    #[serde(skip)]
    pub(crate) target_may_be_a_list: bool,
    pub(crate) exact_match: Option<ExactMatch>,
    #[serde(default)]
    pub(crate) stop: Vec<String>,
    #[serde(default = "max_new_tokens")]
    pub(crate) max_new_tokens: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoglikelihoodKeys {
    pub(crate) context: String,
    pub(crate) continuation: String,
}

/// Turns the description into a group, with one task for each value of a field.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GroupKeys {
    pub(crate) field: String,
    #[serde(default = "one")]
    pub(crate) version: u32,
    /// Values of the field by subgroup.
    pub(crate) members: BTreeMap<String, Vec<String>>,
}

fn one() -> u32 {
    1
}

fn space() -> String {
    " ".to_owned()
}

fn blank_line() -> String {
    "\n\n".to_owned()
}

fn max_new_tokens() -> usize {
    256
}

impl TaskFile {
    /// Parses and checks a description; `path` is for error messages.
    ///
    /// # Errors
    /// Returns [`Error::TaskToml`] if the TOML is invalid, and [`Error::TaskKey`] if the value of a key is invalid.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<TaskFile, Error> {
        let mut task: TaskFile = toml::from_str(text).map_err(|e| Error::toml(path, text, &e))?;
        task.hash = blake3::hash(text.as_bytes()).to_hex().to_string();
        task.check().map_err(|(key, problem)| Error::TaskKey { path: path.to_owned(), key, problem })?;
        Ok(task)
    }

    /// Checks names, templates and that the keys fit together.
    pub(crate) fn check(&self) -> Result<(), Wrong> {
        if self.name.is_empty() || self.name.contains(['/', '\\']) {
            return Err(("name", KeyProblem::FileName));
        }
        template("description", &self.description)?;
        if self.files.eval.is_empty() {
            return Err(("files.eval", KeyProblem::NoFiles));
        }
        if let Some(config) = self.hub.as_ref().and_then(|hub| hub.config.as_ref()) {
            template("hub.config", config)?;
        }
        match (&self.multiple_choice, &self.generation, &self.loglikelihood) {
            (Some(keys), None, None) => self.check_choices(keys),
            (None, Some(keys), None) => self.check_generation(keys),
            (None, None, Some(keys)) => self.check_loglikelihood(keys),
            _ => Err(("multiple_choice", KeyProblem::Kind)),
        }
    }

    fn check_choices(&self, keys: &MultipleChoiceKeys) -> Result<(), Wrong> {
        if !self.metric.is_for_choices() {
            return Err(("metric", KeyProblem::NotForChoices));
        }
        match (&keys.gold, &keys.labels) {
            (Some(gold), None) => formula("multiple_choice.gold", gold)?,
            (None, Some(labels)) => formula("multiple_choice.labels", labels)?,
            _ => return Err(("multiple_choice", KeyProblem::Right)),
        }
        match keys {
            MultipleChoiceKeys {
                context: Some(context),
                choices: Some(choices),
                contexts: None,
                continuation: None,
                ..
            } => {
                template("multiple_choice.context", context)?;
                list("multiple_choice.choices", choices)
            }
            MultipleChoiceKeys {
                context: None,
                choices: None,
                contexts: Some(contexts),
                continuation: Some(continuation),
                ..
            } => {
                template("multiple_choice.continuation", continuation)?;
                list("multiple_choice.contexts", contexts)
            }
            _ => Err(("multiple_choice", KeyProblem::Choices)),
        }
    }

    fn check_generation(&self, keys: &GenerationKeys) -> Result<(), Wrong> {
        if !self.metric.is_for_texts() {
            return Err(("metric", KeyProblem::NotForTexts));
        }
        template("generation.prompt", &keys.prompt)?;
        match (&keys.target, &keys.targets) {
            (Some(target), None) => template("generation.target", target)?,
            (None, Some(targets)) => formula("generation.targets", targets)?,
            _ => return Err(("generation", KeyProblem::Target)),
        }
        let compared = keys.targets.is_some() || keys.exact_match.is_some();
        if compared && self.metric != Metric::ExactMatch {
            return Err(("metric", KeyProblem::NotExactMatch));
        }
        let pipelines = keys.exact_match.iter().flat_map(|options| &options.filter_list);
        let mut names = HashSet::new();
        if let Some(twice) = pipelines.map(|pipeline| &pipeline.name).find(|name| !names.insert(*name)) {
            return Err(("generation.exact_match.filter_list", KeyProblem::Twice { name: twice.clone() }));
        }
        let mut pipelines = keys.exact_match.iter().flat_map(|options| &options.filter_list);
        let early = |pipeline: &FilterPipeline| pipeline.filter.iter().rev().skip(1).any(|f| *f == Filter::TakeFirst);
        if pipelines.any(early) {
            return Err(("generation.exact_match.filter_list", KeyProblem::TakeFirst));
        }
        if keys.stop.iter().any(String::is_empty) {
            return Err(("generation.stop", KeyProblem::EmptyStop));
        }
        if keys.max_new_tokens == 0 {
            return Err(("generation.max_new_tokens", KeyProblem::Zero));
        }
        Ok(())
    }

    fn check_loglikelihood(&self, keys: &LoglikelihoodKeys) -> Result<(), Wrong> {
        if self.metric != Metric::GreedyMatch {
            return Err(("metric", KeyProblem::NotForContinuations));
        }
        template("loglikelihood.context", &keys.context)?;
        template("loglikelihood.continuation", &keys.continuation)
    }
}

fn template(key: &'static str, source: &str) -> Result<(), Wrong> {
    Template::new(source).map(|_| ()).map_err(|problem| (key, problem.into()))
}

fn formula(key: &'static str, source: &str) -> Result<(), Wrong> {
    Formula::new(source).map(|_| ()).map_err(|problem| (key, problem.into()))
}

fn list(key: &'static str, choices: &Choices) -> Result<(), Wrong> {
    match choices {
        Choices::Templates(templates) => templates.iter().try_for_each(|t| template(key, t)),
        Choices::Expression(expression) => formula(key, expression),
    }
}
