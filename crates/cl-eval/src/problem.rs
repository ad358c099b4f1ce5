//! What is wrong with tasks and their descriptions, as data; an [`Error`](crate::Error) adds where.
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! use cl_eval::problem::KeyProblem;
//! use cl_eval::{Error, TaskOptions, load_task};
//!
//! let task = "name = \"sums\"\nmetric = \"exact_match\"\n[files]\neval = []\n\
//!             [generation]\nprompt = \"{{ q }}\"\ntarget = \"{{ a }}\"\n";
//! std::fs::write(folder.path().join("sums.toml"), task)?;
//! let path = folder.path().join("sums.toml");
//! let Err(Error::TaskKey { key, problem, .. }) = load_task(path.to_str().unwrap(), folder.path(), TaskOptions::default())
//! else {
//!     panic!("it was loaded")
//! };
//! assert!(key == "files.eval" && matches!(problem, KeyProblem::NoFiles));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use minijinja::Value;

/// What is wrong with the value of a key in a task description.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyProblem {
    /// The name of a task is not the name of a file.
    #[error("must be a valid file name")]
    FileName,
    /// A list of files is empty.
    #[error("must name at least one file")]
    NoFiles,
    /// The description does not define what to ask, or defines it twice.
    #[error("exactly one of [multiple_choice], [generation] and [loglikelihood] is required")]
    Kind,
    /// The metric is not one for multiple choice.
    #[error("must be acc, acc_norm or probability_mass for [multiple_choice]")]
    NotForChoices,
    /// The metric is not one for generated texts.
    #[error("must not be acc, acc_norm, probability_mass or greedy_match for [generation]")]
    NotForTexts,
    /// The metric is not the one for continuations.
    #[error("must be greedy_match for [loglikelihood]")]
    NotForContinuations,
    /// The keys of a multiple-choice task do not fit together.
    #[error("requires either `context` and `choices`, or `contexts` and `continuation`")]
    Choices,
    /// A multiple-choice task does not define which choices are right, or defines it twice.
    #[error("requires either `gold` or `labels`")]
    Right,
    /// A generation task does not define its right answers, or defines them twice.
    #[error("requires either `target` or `targets`")]
    Target,
    /// Right answers are compared by `exact_match` alone.
    #[error("must be exact_match if [generation] has `targets` or `exact_match`")]
    NotExactMatch,
    /// Two pipelines of filters have the same name.
    #[error("contains the name {name:?} twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// A filter follows `take_first`; in lm-eval, it would be applied to the characters of the answer.
    #[error("must have take_first only as the last filter")]
    TakeFirst,
    /// A stop sequence is empty.
    #[error("must not contain an empty string, which would end every answer immediately")]
    EmptyStop,
    /// A number is 0.
    #[error("must be at least 1")]
    Zero,
    /// A template or an expression is invalid.
    #[error(transparent)]
    Template(#[from] TemplateProblem),
}

/// What is wrong with a template or an expression, or with its value for a row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateProblem {
    /// It does not compile, or fails for a row.
    #[error("{}", describe(error))]
    Engine {
        /// The template engine's error.
        error: minijinja::Error,
    },
    /// An expression is written like a template, in braces.
    #[error("is an expression; remove {{{{ and }}}}")]
    Braces,
    /// It uses fields that the row does not have.
    #[error("{}", shortened(&format!("no {}; the row has {}", quoted(fields), has.join(", "))))]
    Missing {
        /// The fields.
        fields: Vec<String>,
        /// The fields of the row.
        has: Vec<String>,
    },
    /// It has no value.
    #[error("it has no value")]
    NoValue,
    /// It is not a list of strings.
    #[error("{}", shortened(&format!("is {value:?}, expected a list of strings")))]
    NotAList {
        /// Its value.
        value: Value,
    },
    /// There are fewer than two choices.
    #[error("{choices} in the list; a question needs at least 2 choices")]
    FewChoices {
        /// Number of choices.
        choices: usize,
    },
    /// It is not one of the choices.
    #[error("is {value:?}, expected the text of a choice or an index from 0 below {choices}")]
    NotAChoice {
        /// Its value.
        value: Value,
        /// Number of choices.
        choices: usize,
    },
    /// It is neither a text nor a list of texts.
    #[error("{}", shortened(&format!("is {value:?}, expected a text or a list of at least one text")))]
    NotAnswers {
        /// Its value.
        value: Value,
    },
    /// It is not a list with a label of every choice.
    #[error("{}", shortened(&format!("is {value:?}, expected {choices} labels of 0 or 1, at least one of them 1")))]
    NotLabels {
        /// Its value.
        value: Value,
        /// Number of choices.
        choices: usize,
    },
}

/// Why a task file of lm-evaluation-harness cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarnessProblem {
    /// It is not valid YAML.
    #[error("{message}")]
    Yaml {
        /// The parser's message, shortened.
        message: String,
    },
    /// It is a group of tasks.
    #[error("expected the name of a single task; of a group, give the files of its tasks")]
    Group,
    /// The kind of task is not supported.
    #[error(
        "{output_type} is not supported, only multiple_choice, loglikelihood and generate_until; for perplexities, use \
         `cl eval perplexity`"
    )]
    OutputType {
        /// The kind.
        output_type: String,
    },
    /// A value refers to Python code.
    #[error("{function} is Python code, which is not run; write a task description in TOML instead")]
    Function {
        /// The function.
        function: String,
    },
    /// The key is not supported.
    #[error("is not supported; write a task description in TOML instead")]
    Unsupported,
    /// The value cannot be read.
    #[error("{message}")]
    Value {
        /// What is wrong with it.
        message: String,
    },
    /// The value is not supported.
    #[error("expected {expected}")]
    Expected {
        /// What is expected.
        expected: &'static str,
    },
}

/// Why few-shot examples cannot be read from an installed lm-eval.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LmEvalProblem {
    /// The path is not a possible location of lm-eval.
    #[error("expected the lm-eval directory, a task's .yaml file, or a Python interpreter")]
    NotLmEval,
    /// The Python interpreter cannot be started.
    #[error("cannot be started: {}", cl_checkpoint::files::explain(source))]
    NotStarted {
        /// The I/O error.
        r#source: std::io::Error,
    },
    /// lm-eval is not installed for the Python interpreter.
    #[error("has no lm-eval; run `pip install lm-eval`, or use another Python interpreter")]
    NotInstalled,
    /// The file of the task is missing.
    #[error("has no {yaml}; expected the directory of the Python package lm_eval")]
    NoFile {
        /// Path of the file in the package.
        yaml: String,
    },
    /// The task's file is not YAML with few-shot examples.
    #[error("no task with fewshot_config.samples: {message}")]
    Yaml {
        /// The parser's message, shortened.
        message: String,
    },
    /// The list of few-shot examples is empty.
    #[error("fewshot_config.samples is empty")]
    NoSamples,
}

/// What a missing file of a task is needed for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Need {
    /// The documents.
    #[error("its documents are read from it")]
    Documents,
    /// The value of a template variable.
    #[error("template variable `{key}` is read from it")]
    Variable {
        /// The variable.
        key: String,
    },
    /// Few-shot examples.
    #[error("the {shots} few-shot examples are drawn from it")]
    Shots {
        /// Number of few-shot examples per document.
        shots: usize,
    },
}

fn quoted(fields: &[String]) -> String {
    fields.iter().map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", ")
}

/// Formats the error with its causes, without the location, which is not useful in a one-line template.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    shortened(&text.replace(" (in <string>:1)", "").replace(" (in <expression>:1)", ""))
}

/// Shortens a long message by omitting its middle.
pub(crate) fn shortened(message: &str) -> String {
    const MOST: usize = 200; // characters at each end
    let message = message.trim();
    let count = message.chars().count();
    if count <= 2 * MOST {
        return message.to_owned();
    }
    let part = |from: usize, n: usize| message.chars().skip(from).take(n).collect::<String>();
    format!("{} … {}", part(0, MOST), part(count - MOST, MOST))
}
