//! Model cards: README.md with front matter for the Hub.
//!
//! Specification: <https://huggingface.co/docs/hub/model-cards> and
//! <https://github.com/huggingface/hub-docs/blob/main/modelcard.md>.

use std::fmt::Write;

use serde_json::Value;

/// The front matter of a card. Empty lists and `None` are omitted.
///
/// # Example
/// ```
/// use cl_hub::CardData;
///
/// let data = CardData { base_model: vec!["org/base".into()], license: Some("mit".into()), ..CardData::default() };
/// assert_eq!(data.front_matter(), "---\nlicense: \"mit\"\nbase_model:\n- \"org/base\"\n---\n");
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CardData {
    /// Licence by its identifier, such as `apache-2.0`.
    pub license: Option<String>,
    /// Repositories of the models that it was derived from.
    pub base_model: Vec<String>,
    /// Relation to the base: `adapter`, `finetune`, `merge` or `quantized`.
    pub base_model_relation: Option<&'static str>,
    /// Repositories of training data.
    pub datasets: Vec<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Library: `transformers` or `peft`.
    pub library_name: Option<&'static str>,
    /// Task, as named by the Hub, such as `text-generation`.
    pub pipeline_tag: Option<&'static str>,
    /// Name of the model in the results.
    pub name: String,
    /// Scores.
    pub results: Vec<CardResult>,
}

/// A score.
#[derive(Clone, Debug, PartialEq)]
pub struct CardResult {
    /// The evaluated task.
    pub task: String,
    /// The metric.
    pub metric: String,
    /// Its value.
    pub value: f64,
    /// Its standard error.
    pub stderr: Option<f64>,
}

impl CardData {
    /// Returns the front matter as YAML, including the lines `---` around it.
    pub fn front_matter(&self) -> String {
        let CardData { library_name, pipeline_tag, .. } = *self;
        let mut out = String::from("---\n");
        let mut one = |key: &str, value: Option<&str>| {
            if let Some(value) = value {
                let _ = writeln!(out, "{key}: {}", quoted(value));
            }
        };
        one("license", self.license.as_deref());
        one("library_name", library_name);
        one("pipeline_tag", pipeline_tag);
        one("base_model_relation", self.base_model_relation.filter(|_| !self.base_model.is_empty()));
        for (key, values) in [("base_model", &self.base_model), ("datasets", &self.datasets), ("tags", &self.tags)] {
            if !values.is_empty() {
                let _ = writeln!(out, "{key}:");
                values.iter().for_each(|value| out += &format!("- {}\n", quoted(value)));
            }
        }
        if !self.results.is_empty() {
            out += &format!("model-index:\n- name: {}\n  results:\n", quoted(&self.name));
            for result in &self.results {
                let task = quoted(&result.task);
                out += &format!(
                    "  - task:\n      type: text-generation\n    dataset:\n      name: {task}\n      type: {task}\n    \
                     metrics:\n    - type: {}\n      value: {}\n",
                    quoted(&result.metric),
                    result.value
                );
            }
        }
        out + "---\n"
    }
}

/// Reads scores from a `results.json` in lm-eval's layout: `{"results": {task: {"metric,filter": value}}}`.
pub(crate) fn results(value: &Value) -> Vec<CardResult> {
    let mut all = Vec::new();
    for (task, metrics) in value.get("results").and_then(Value::as_object).into_iter().flatten() {
        let metrics = metrics.as_object();
        for (key, value) in metrics.into_iter().flatten() {
            let (metric, filter) = key.split_once(',').unwrap_or((key, "none"));
            let Some(value) = value.as_f64().filter(|v| v.is_finite()) else { continue };
            if metric.ends_with("_stderr") || !key.contains(',') {
                continue;
            }
            let stderr = metrics.and_then(|m| m.get(&format!("{metric}_stderr,{filter}"))).and_then(Value::as_f64);
            let metric = if filter == "none" { metric.to_owned() } else { format!("{metric} ({filter})") };
            all.push(CardResult { task: task.clone(), metric, value, stderr });
        }
    }
    all
}

/// Splits a card into front matter and body; the front matter is empty if the card has none.
pub(crate) fn split(card: &str) -> (&str, &str) {
    let parts = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n"));
    parts.unwrap_or(("", card))
}

/// Returns the value of a key of front matter, if it is one word.
pub(crate) fn word<'a>(front_matter: &'a str, key: &str) -> Option<&'a str> {
    let line = front_matter.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let value = line.trim().trim_matches(['"', '\'']);
    (!value.is_empty() && !value.starts_with(['[', '{', '-', '#'])).then_some(value)
}

/// Quotes a string. JSON strings are also valid YAML.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
