//! Tasks built from a description and rows.

use std::path::PathBuf;

use cl_data::{Profile, Role};
use minijinja::Value;
use minijinja::value::ValueKind;
use serde_json::{Map, json};

use super::chat::{Chat, Turn, joined};
use super::few_shot::{ShotSampler, TooFew};
use super::options::TaskOptions;
use super::python_list::python_list;
use super::rows::Document;
use super::task_file::{Choices, GenerationKeys, TaskFile, Wrong};
use super::template::{Formula, Template};
use super::{Harness, Task};
use crate::error::Error;
use crate::metrics::{ExactMatch, Gold, Metric, Target};
use crate::problem::{KeyProblem, TemplateProblem};
use crate::request::{BoxError, GenerateRequest, LoglikelihoodRequest, Request};

/// A task built from a description and rows. All requests are rendered when it is loaded.
pub(crate) struct DescribedTask {
    name: String,
    metric: Metric,
    harness: Harness,
    documents: Vec<(Ask, Target)>,
    available: usize,
    max_new_tokens: usize,
    stop: Vec<String>,
    settings: Map<String, serde_json::Value>,
}

/// The part of a request that differs between documents of a task.
enum Ask {
    Write(String),
    Continue {
        context: String,
        continuation: String,
    },
    /// Several continuations of one context, or one continuation of several contexts.
    Choose {
        contexts: Vec<String>,
        continuations: Vec<String>,
    },
}

impl Task for DescribedTask {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.documents.len()
    }

    fn available(&self) -> usize {
        self.available
    }

    fn request(&self, document: usize) -> Request {
        match &self.documents[document].0 {
            Ask::Write(prompt) => Request::Generate(GenerateRequest {
                prompt: prompt.clone(),
                max_new_tokens: self.max_new_tokens,
                stop: self.stop.clone(),
            }),
            Ask::Continue { context, continuation } => Request::Continuation(LoglikelihoodRequest {
                context: context.clone(),
                continuation: continuation.clone(),
            }),
            Ask::Choose { contexts, continuations } => {
                let n = contexts.len().max(continuations.len());
                let pair = |i: usize| LoglikelihoodRequest {
                    context: contexts[i.min(contexts.len() - 1)].clone(),
                    continuation: continuations[i.min(continuations.len() - 1)].clone(),
                };
                Request::Loglikelihood((0..n).map(pair).collect())
            }
        }
    }

    fn target(&self, document: usize) -> Target {
        self.documents[document].1.clone()
    }

    fn metric(&self) -> Metric {
        self.metric
    }

    fn harness(&self) -> Harness {
        self.harness
    }

    fn settings(&self) -> Map<String, serde_json::Value> {
        self.settings.clone()
    }
}

/// The rows and values from which a description's templates are rendered.
pub(crate) struct Material {
    pub(crate) name: String,
    pub(crate) documents: Vec<Document>,
    /// Number of documents before applying the limit.
    pub(crate) available: usize,
    /// Rows from which few-shot examples are drawn.
    pub(crate) pool: Vec<Document>,
    /// Template variables in addition to a row's fields.
    pub(crate) values: Map<String, serde_json::Value>,
    /// The files that were read, to be saved with results.
    pub(crate) files: Vec<serde_json::Value>,
}

/// Builds a task.
pub(crate) fn build(task: &TaskFile, material: Material, options: &TaskOptions<'_>) -> Result<DescribedTask, Error> {
    let draws =
        Draws { shots: task.fewshot.shots(options.num_fewshot), seed: options.fewshot_seed.unwrap_or(FEWSHOT_SEED) };
    let metric = metric(task, options);
    let documents = filled(task, &material, options, metric, draws)?;
    if documents.is_empty() {
        return Err(Error::NoDocuments { name: material.name });
    }
    let generation = task.generation.as_ref();
    let max_new_tokens = options.max_new_tokens.or(generation.map(|g| g.max_new_tokens)).unwrap_or_default();
    let max_new_tokens = options.most_new_tokens.map_or(max_new_tokens, |most| max_new_tokens.min(most));
    let stop = generation.map(|g| g.stop.clone()).unwrap_or_default();
    let mut settings = settings(task, &material, options, draws);
    if generation.is_some() {
        settings.insert("max_new_tokens".to_owned(), json!(max_new_tokens));
        settings.insert("stop".to_owned(), json!(stop));
    }
    if let Some(exact_match) = generation.and_then(|g| g.exact_match.as_ref()) {
        settings.insert("exact_match".to_owned(), json!(exact_match));
    }
    let Material { name, available, .. } = material;
    let harness = task.harness;
    Ok(DescribedTask { name, metric, harness, documents, available, max_new_tokens, stop, settings })
}

/// Returns the requested metric if it is for tasks of this kind, otherwise the task's.
fn metric(task: &TaskFile, options: &TaskOptions<'_>) -> Metric {
    let fits = |metric: &Metric| {
        metric.is_for_texts() == task.metric.is_for_texts() && metric.is_for_choices() == task.metric.is_for_choices()
    };
    options.metric.filter(fits).unwrap_or(match (task.metric, options.profile) {
        // The paper's script swaps the two texts.
        (Metric::RougeL, Profile::Paper) => Metric::RougeLSwapped,
        (metric, _) => metric,
    })
}

/// Number of few-shot examples per document, and the random seed.
#[derive(Clone, Copy)]
struct Draws {
    shots: usize,
    seed: u32,
}

/// Renders every document with its few-shot examples.
fn filled(
    task: &TaskFile,
    material: &Material,
    options: &TaskOptions<'_>,
    metric: Metric,
    Draws { shots, seed }: Draws,
) -> Result<Vec<(Ask, Target)>, Error> {
    let name = &material.name;
    let filler = Filler::new(task, material, options, metric).map_err(|(key, problem)| Error::TaskKey {
        path: PathBuf::from(name),
        key,
        problem,
    })?;
    let pool = material.pool.iter().map(|d| &d.row).collect();
    let mut sampler = ShotSampler::new(pool, task.fewshot.sampler, task.excludes_document(), seed);
    let fill = |document: &Document| {
        let drawn = sampler.draw(&document.row, shots).map_err(|TooFew { wanted, available }| Error::Shots {
            name: name.clone(),
            shots,
            wanted,
            available,
        })?;
        let shots: Vec<&Document> = drawn.into_iter().map(|i| &material.pool[i]).collect();
        filler.document(document, &shots)
    };
    material.documents.iter().map(fill).collect()
}

/// Returns the task's settings, as saved with results.
fn settings(
    task: &TaskFile,
    material: &Material,
    options: &TaskOptions<'_>,
    Draws { shots, seed }: Draws,
) -> Map<String, serde_json::Value> {
    let settings = [
        ("version", json!(task.version)),
        ("task_file", json!(task.hash)),
        ("source", json!(task.source)),
        ("files", json!(material.files)),
        ("limit", json!(options.limit)),
        ("num_fewshot", json!(shots)),
        ("fewshot_seed", json!(seed)),
        ("sampler", json!(task.fewshot.sampler)),
        ("exclude_document", json!(task.excludes_document())),
        ("description", json!(task.description)),
        ("target_delimiter", json!(task.target_delimiter)),
        ("fewshot_delimiter", json!(task.fewshot_delimiter)),
        ("system_instruction", json!(options.system_instruction)),
        ("chat", json!(options.chat.is_some())),
        ("fewshot_as_multiturn", json!(options.fewshot_as_multiturn)),
    ];
    settings.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// lm-eval's default seed.
const FEWSHOT_SEED: u32 = 1234;

/// The compiled templates of a task.
struct Filler<'a> {
    name: &'a str,
    kind: Kind,
    description: Template,
    target_delimiter: &'a str,
    fewshot_delimiter: &'a str,
    system_instruction: &'a str,
    chat: Chat<'a>,
    values: &'a Map<String, serde_json::Value>,
    metric: Metric,
    exact_match: ExactMatch,
}

enum Kind {
    Write { prompt: Template, target: Template },
    Answer { prompt: Template, answers: Answers },
    Continue { context: Template, continuation: Template },
    Choices { context: Template, choices: List, right: Right },
    Contexts { contexts: List, continuation: Template, right: Right },
}

/// The right answers of a row.
enum Answers {
    Template(Template),
    /// A template whose text may be a Python list, as in lm-eval.
    MaybeList(Template),
    Formula(Formula),
}

/// Which choices are right.
enum Right {
    Gold(Formula),
    Labels(Formula),
}

enum List {
    Templates(Vec<Template>),
    Formula(Formula),
}

/// The rendered templates of a row.
enum Filled {
    Write { prompt: String, target: String },
    Answer { prompt: String, answers: Vec<String> },
    Continue { context: String, continuation: String },
    Choices { context: String, choices: Vec<String>, gold: Gold },
    Contexts { contexts: Vec<String>, continuation: String, gold: Gold },
}

impl Kind {
    fn new(task: &TaskFile) -> Result<Kind, Wrong> {
        match (&task.generation, &task.loglikelihood, &task.multiple_choice) {
            (Some(keys), ..) => Kind::generation(keys),
            (_, Some(keys), _) => Ok(Kind::Continue {
                context: template("loglikelihood.context", &keys.context)?,
                continuation: template("loglikelihood.continuation", &keys.continuation)?,
            }),
            (.., Some(keys)) => {
                let right = match (&keys.gold, &keys.labels) {
                    (Some(gold), None) => Right::Gold(formula("multiple_choice.gold", gold)?),
                    (None, Some(labels)) => Right::Labels(formula("multiple_choice.labels", labels)?),
                    _ => return Err(("multiple_choice", KeyProblem::Right)),
                };
                match (&keys.context, &keys.choices, &keys.contexts, &keys.continuation) {
                    (Some(context), Some(choices), ..) => Ok(Kind::Choices {
                        context: template("multiple_choice.context", context)?,
                        choices: list("multiple_choice.choices", choices)?,
                        right,
                    }),
                    (_, _, Some(contexts), Some(continuation)) => Ok(Kind::Contexts {
                        contexts: list("multiple_choice.contexts", contexts)?,
                        continuation: template("multiple_choice.continuation", continuation)?,
                        right,
                    }),
                    _ => Err(("multiple_choice", KeyProblem::Choices)),
                }
            }
            (None, None, None) => Err(("multiple_choice", KeyProblem::Kind)),
        }
    }
}

impl Kind {
    fn generation(keys: &GenerationKeys) -> Result<Kind, Wrong> {
        let prompt = template("generation.prompt", &keys.prompt)?;
        let target = keys.target.as_ref().map(|target| template("generation.target", target)).transpose()?;
        let targets = keys.targets.as_ref().map(|targets| formula("generation.targets", targets)).transpose()?;
        let answers = match (target, targets) {
            (Some(target), None) if keys.exact_match.is_none() => return Ok(Kind::Write { prompt, target }),
            (Some(target), None) if keys.target_may_be_a_list => Answers::MaybeList(target),
            (Some(target), None) => Answers::Template(target),
            (None, Some(targets)) => Answers::Formula(targets),
            _ => return Err(("generation", KeyProblem::Target)),
        };
        Ok(Kind::Answer { prompt, answers })
    }
}

impl<'a> Filler<'a> {
    fn new(
        task: &'a TaskFile,
        material: &'a Material,
        options: &TaskOptions<'a>,
        metric: Metric,
    ) -> Result<Filler<'a>, Wrong> {
        Ok(Filler {
            name: &material.name,
            kind: Kind::new(task)?,
            description: template("description", &task.description)?,
            target_delimiter: &task.target_delimiter,
            fewshot_delimiter: &task.fewshot_delimiter,
            system_instruction: options.system_instruction.unwrap_or_default(),
            chat: Chat { template: options.chat, fewshot_as_multiturn: options.fewshot_as_multiturn },
            values: &material.values,
            metric,
            exact_match: task.generation.as_ref().and_then(|keys| keys.exact_match.clone()).unwrap_or_default(),
        })
    }

    /// Returns a document's request and target.
    fn document(&self, document: &Document, shots: &[&Document]) -> Result<(Ask, Target), Error> {
        let (filled, description) = self.filled(document)?;
        let mut turns = Vec::new();
        let system = joined(self.system_instruction, &description, self.fewshot_delimiter);
        if !system.is_empty() {
            turns.push(Turn::new(Role::System, system, ""));
        }
        for shot in shots {
            turns.extend(self.shot(self.filled(shot)?.0));
        }
        let text = |turns: &[Turn]| {
            let chat = |source: BoxError| Error::Chat { name: self.name.to_owned(), source };
            self.chat.text(turns).map_err(chat)
        };
        let ask = |question: &str| {
            let question = Turn::new(Role::User, question, "");
            text(&turns.iter().cloned().chain([question]).collect::<Vec<_>>())
        };
        // A chat template ends with the marker of the assistant's turn, so no delimiter is needed.
        let delimiter = if self.chat.template.is_some() { "" } else { self.target_delimiter };
        let continued = |choice: &String| format!("{delimiter}{choice}");
        Ok(match filled {
            Filled::Write { prompt, target } => (Ask::Write(ask(&prompt)?), self.reference(target, prompt)),
            Filled::Answer { prompt, answers } if self.metric == Metric::ExactMatch => {
                (Ask::Write(ask(&prompt)?), Target::Answers { answers, exact_match: self.exact_match.clone() })
            }
            Filled::Answer { prompt, mut answers } => {
                (Ask::Write(ask(&prompt)?), self.reference(answers.swap_remove(0), prompt))
            }
            Filled::Continue { context, continuation } => {
                // As in lm-eval, no delimiter is added before a document's continuation, but before a few-shot example's.
                let ask = Ask::Continue { context: ask(&context)?, continuation: continuation.clone() };
                (ask, Target::Continuation { continuation })
            }
            Filled::Choices { context, choices, gold } => {
                let continuations = choices.iter().map(continued).collect();
                let ask = Ask::Choose { contexts: vec![ask(&context)?], continuations };
                (ask, Target::Choice { choices, gold })
            }
            Filled::Contexts { contexts, continuation, gold } => {
                let asked = contexts.iter().map(|c| ask(c)).collect::<Result<_, _>>()?;
                let ask = Ask::Choose { contexts: asked, continuations: vec![continued(&continuation)] };
                (ask, Target::Choice { choices: contexts, gold })
            }
        })
    }

    fn reference(&self, reference: String, prompt: String) -> Target {
        Target::Reference { reference, source: (self.metric == Metric::Sari).then_some(prompt) }
    }

    /// Returns a few-shot example. If its answer is empty, there is only the question, with no delimiter after it, as
    /// in lm-eval.
    fn shot(&self, filled: Filled) -> Vec<Turn> {
        let (question, answer) = match filled {
            Filled::Write { prompt: question, target: answer }
            | Filled::Continue { context: question, continuation: answer } => {
                (question, Some(answer).filter(|t| !t.is_empty()))
            }
            Filled::Answer { prompt, mut answers } => (prompt, Some(answers.swap_remove(0)).filter(|t| !t.is_empty())),
            Filled::Choices { context, mut choices, gold } => (context, Some(choices.swap_remove(gold.first()))),
            Filled::Contexts { mut contexts, continuation, gold } => {
                (contexts.swap_remove(gold.first()), Some(continuation).filter(|t| !t.is_empty()))
            }
        };
        match answer {
            Some(answer) => vec![
                Turn::new(Role::User, question, self.target_delimiter),
                Turn::new(Role::Assistant, answer, self.fewshot_delimiter),
            ],
            None => vec![Turn::new(Role::User, question, "")],
        }
    }

    fn filled(&self, document: &Document) -> Result<(Filled, String), Error> {
        let mut fields = document.row.clone();
        fields.extend(self.values.iter().map(|(k, v)| (k.clone(), v.clone())));
        self.fill(&Value::from_serialize(&fields)).map_err(|(key, problem)| Error::TaskRow {
            name: self.name.to_owned(),
            path: document.path.clone(),
            row: document.index,
            key,
            problem: Box::new(problem),
        })
    }

    fn fill(&self, row: &Value) -> Result<(Filled, String), (&'static str, TemplateProblem)> {
        let filled = match &self.kind {
            Kind::Write { prompt, target } => Filled::Write {
                prompt: prompt.render(row).map_err(|m| ("generation.prompt", m))?,
                target: target.render(row).map_err(|m| ("generation.target", m))?,
            },
            Kind::Answer { prompt, answers } => {
                let prompt = prompt.render(row).map_err(|m| ("generation.prompt", m))?;
                Filled::Answer { prompt, answers: answers.of(row)? }
            }
            Kind::Continue { context, continuation } => Filled::Continue {
                context: context.render(row).map_err(|m| ("loglikelihood.context", m))?,
                continuation: continuation.render(row).map_err(|m| ("loglikelihood.continuation", m))?,
            },
            Kind::Choices { context, choices, right } => {
                let context = context.render(row).map_err(|m| ("multiple_choice.context", m))?;
                let choices = several(choices, row).map_err(|m| ("multiple_choice.choices", m))?;
                let gold = right.gold(row, &choices)?;
                Filled::Choices { context, choices, gold }
            }
            Kind::Contexts { contexts, continuation, right } => {
                let contexts = several(contexts, row).map_err(|m| ("multiple_choice.contexts", m))?;
                let continuation = continuation.render(row).map_err(|m| ("multiple_choice.continuation", m))?;
                let gold = right.gold(row, &contexts)?;
                Filled::Contexts { contexts, continuation, gold }
            }
        };
        Ok((filled, self.description.render(row).map_err(|m| ("description", m))?))
    }
}

impl Answers {
    /// Returns the right answers of a row; at least one.
    fn of(&self, row: &Value) -> Result<Vec<String>, (&'static str, TemplateProblem)> {
        let rendered = |template: &Template| template.render(row).map_err(|m| ("generation.target", m));
        match self {
            Answers::Template(template) => Ok(vec![rendered(template)?]),
            Answers::MaybeList(template) => {
                let text = rendered(template)?;
                Ok(python_list(&text).filter(|answers| !answers.is_empty()).unwrap_or_else(|| vec![text]))
            }
            Answers::Formula(formula) => formula.value(row).and_then(answers).map_err(|m| ("generation.targets", m)),
        }
    }
}

/// Returns the right answers that an expression evaluates to: a text, a number, or a list of them, as Python's `str`.
fn answers(value: Value) -> Result<Vec<String>, TemplateProblem> {
    let text = |value: &Value| match value.kind() {
        ValueKind::String | ValueKind::Number => Some(value.to_string()),
        ValueKind::Bool => Some(if value.is_true() { "True" } else { "False" }.to_owned()),
        _ => None,
    };
    let texts: Option<Vec<String>> = match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter().ok().and_then(|items| items.map(|v| text(&v)).collect())
        }
        _ => text(&value).map(|text| vec![text]),
    };
    texts.filter(|texts| !texts.is_empty()).ok_or(TemplateProblem::NotAnswers { value })
}

impl Right {
    fn gold(&self, row: &Value, choices: &[String]) -> Result<Gold, (&'static str, TemplateProblem)> {
        match self {
            Right::Gold(gold) => index(gold, row, choices).map(Gold::One).map_err(|m| ("multiple_choice.gold", m)),
            Right::Labels(labels) => {
                labelled(labels, row, choices.len()).map(Gold::Several).map_err(|m| ("multiple_choice.labels", m))
            }
        }
    }
}

impl List {
    fn texts(&self, row: &Value) -> Result<Vec<String>, TemplateProblem> {
        let formula = match self {
            List::Templates(templates) => return templates.iter().map(|t| t.render(row)).collect(),
            List::Formula(formula) => formula,
        };
        let value = formula.value(row)?;
        let not_a_list = || TemplateProblem::NotAList { value: value.clone() };
        if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            return Err(not_a_list());
        }
        let items = value.try_iter().map_err(|_| not_a_list())?;
        items.map(|v| v.as_str().map(str::to_owned).ok_or_else(not_a_list)).collect()
    }
}

/// Returns the texts of a list of choices. At least two are required, since a single choice would always be correct.
fn several(list: &List, row: &Value) -> Result<Vec<String>, TemplateProblem> {
    let texts = list.texts(row)?;
    if texts.len() < 2 {
        return Err(TemplateProblem::FewChoices { choices: texts.len() });
    }
    Ok(texts)
}

/// Returns the index of the correct choice, given as a 0-based index or as the choice's text.
fn index(gold: &Formula, row: &Value, choices: &[String]) -> Result<usize, TemplateProblem> {
    let value = gold.value(row)?;
    let found = match value.as_str() {
        Some(text) => choices.iter().position(|c| c == text),
        None => value.as_usize().filter(|i| *i < choices.len()),
    };
    found.ok_or(TemplateProblem::NotAChoice { value, choices: choices.len() })
}

/// Returns the indices of the choices whose label is 1; the others have the label 0.
fn labelled(labels: &Formula, row: &Value, choices: usize) -> Result<Vec<usize>, TemplateProblem> {
    let value = labels.value(row)?;
    let not_labels = || TemplateProblem::NotLabels { value: value.clone(), choices };
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Err(not_labels());
    }
    let items: Vec<Value> = value.try_iter().map_err(|_| not_labels())?.collect();
    let labels: Option<Vec<usize>> = items.iter().map(|v| v.as_usize().filter(|label| *label <= 1)).collect();
    let labels = labels.filter(|l| l.len() == choices && l.contains(&1)).ok_or_else(not_labels)?;
    Ok((0..choices).filter(|&i| labels[i] == 1).collect())
}

fn template(key: &'static str, source: &str) -> Result<Template, Wrong> {
    Template::new(source).map_err(|problem| (key, problem.into()))
}

fn formula(key: &'static str, source: &str) -> Result<Formula, Wrong> {
    Formula::new(source).map_err(|problem| (key, problem.into()))
}

fn list(key: &'static str, choices: &Choices) -> Result<List, Wrong> {
    Ok(match choices {
        Choices::Templates(templates) => {
            List::Templates(templates.iter().map(|t| template(key, t)).collect::<Result<_, _>>()?)
        }
        Choices::Expression(expression) => List::Formula(formula(key, expression)?),
    })
}
