//! Model cards: README.md with front matter for the Hub.
//!
//! Specification: <https://huggingface.co/docs/hub/model-cards> and
//! <https://github.com/huggingface/hub-docs/blob/main/modelcard.md>.

use std::fmt::Write;

use cl_checkpoint::files::of_yaml;
use serde_json::{Map, Value};

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
    /// Library, such as `transformers` or `peft`.
    pub library_name: Option<String>,
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
    /// Number of documents that were scored.
    pub documents: Option<u64>,
}

impl CardData {
    /// Returns the front matter as YAML, including the lines `---` around it.
    pub fn front_matter(&self) -> String {
        self.united(&FrontMatter::default())
    }

    /// Returns the front matter with the keys of an existing one, whose text is kept unless this card has other values
    /// of a list, the licence, the library or the scores.
    pub(crate) fn united(&self, old: &FrontMatter) -> String {
        let own = self.blocks(old);
        let of = |key: &str| own.iter().find(|(k, _)| *k == key).map(|(_, block)| block.as_str());
        let mut out = String::from("---\n");
        for (key, text) in &old.blocks {
            match key.as_str() {
                "base_model" | "datasets" | "tags" | "license" | "library_name" => {
                    out += if self.agrees(key, old) { text } else { of(key).unwrap_or_default() };
                }
                "model-index" if !self.results.is_empty() => out += of(key).unwrap_or_default(),
                _ => out += text,
            }
        }
        out.extend(own.iter().filter(|(key, _)| !old.has(key)).map(|(_, block)| block.as_str()));
        out + "---\n"
    }

    /// Whether the card has the values of an existing front matter.
    fn agrees(&self, key: &str, old: &FrontMatter) -> bool {
        match key {
            "base_model" => self.base_model == old.list(key),
            "datasets" => self.datasets == old.list(key),
            "tags" => self.tags == old.list(key),
            "library_name" => old.word(key) == self.library_name.as_deref(),
            _ => self.license.is_none() || old.word(key) == self.license.as_deref(),
        }
    }

    /// Returns the text of each key, in the order of a new card.
    fn blocks(&self, old: &FrontMatter) -> Vec<(&'static str, String)> {
        let relation = self.base_model_relation.filter(|_| !self.base_model.is_empty());
        let words = [
            ("license", self.license.as_deref()),
            ("library_name", self.library_name.as_deref()),
            ("pipeline_tag", self.pipeline_tag),
            ("base_model_relation", relation),
        ];
        let words = words.into_iter().filter_map(|(key, value)| Some((key, format!("{key}: {}\n", quoted(value?)))));
        let mut out: Vec<(&'static str, String)> = words.collect();
        for (key, values) in [("base_model", &self.base_model), ("datasets", &self.datasets), ("tags", &self.tags)] {
            if !values.is_empty() {
                let items: String = values.iter().map(|value| format!("- {}\n", quoted(value))).collect();
                out.push((key, format!("{key}:\n{items}")));
            }
        }
        if !self.results.is_empty() {
            let mut text = String::from("model-index:\n");
            // JSON is also valid YAML.
            let others = old.values.get("model-index").and_then(Value::as_array).into_iter().flatten();
            for other in others.filter(|entry| entry["name"] != self.name.as_str()) {
                let _ = writeln!(text, "- {other}");
            }
            let _ = writeln!(text, "- name: {}\n  results:", quoted(&self.name));
            for result in &self.results {
                let (task, metric) = (quoted(&result.task), quoted(&result.metric));
                text += &format!(
                    "  - task:\n      type: text-generation\n    dataset:\n      name: {task}\n      type: {task}\n    \
                     metrics:\n    - type: {metric}\n      value: {}\n",
                    result.value
                );
                if let Some(documents) = result.documents {
                    let shown = quoted(&format!("{} ({documents} documents)", result.metric));
                    text += &format!("      name: {shown}\n");
                }
            }
            out.push(("model-index", text));
        }
        out
    }
}

/// The front matter of an existing card.
#[derive(Default)]
pub(crate) struct FrontMatter {
    /// Its values.
    values: Map<String, Value>,
    /// The text of each key, in order; comments before the first key have an empty one.
    blocks: Vec<(String, String)>,
}

impl FrontMatter {
    /// Parses the YAML between the lines `---`.
    pub(crate) fn parse(yaml: &str) -> Result<FrontMatter, String> {
        let is_empty = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
        if yaml.lines().all(is_empty) {
            return Ok(FrontMatter::default());
        }
        // In YAML 1.2, which the Hub reads, `no` and `y` are text.
        let options = serde_saphyr::options! { strict_booleans: true };
        let values: Map<String, Value> =
            serde_saphyr::from_str_with_options(yaml, options).map_err(|e| of_yaml(&e.to_string()))?;
        let mut blocks: Vec<(String, String)> = Vec::new();
        for line in yaml.lines() {
            let is_key = !line.starts_with([' ', '\t', '#', '-']) && !line.is_empty();
            let key =
                line.split_once(':').filter(|(_, rest)| is_key && (rest.is_empty() || rest.starts_with([' ', '\t'])));
            match (key, blocks.last_mut()) {
                (Some((key, _)), _) => {
                    blocks.push((key.trim().trim_matches(['"', '\'']).to_owned(), format!("{line}\n")));
                }
                (None, Some((_, text))) => *text += &format!("{line}\n"),
                (None, None) => blocks.push((String::new(), format!("{line}\n"))),
            }
        }
        // A mapping in another style than one key a line.
        let same = blocks.iter().map(|(key, _)| key).filter(|key| !key.is_empty()).eq(values.keys());
        if !same {
            blocks = values.iter().map(|(key, value)| (key.clone(), format!("{}: {value}\n", quoted(key)))).collect();
        }
        Ok(FrontMatter { values, blocks })
    }

    /// Whether a key has a value.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Returns a value that is a string.
    pub(crate) fn word(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.as_str()
    }

    /// Returns the items of a list; a single value is a list of one.
    pub(crate) fn list(&self, key: &str) -> Vec<String> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match self.values.get(key) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(values)) => values.iter().map(text).collect(),
            Some(value) => vec![text(value)],
        }
    }
}

/// Reads scores from a `results.json` in lm-eval's layout: `{"results": {task: {"metric,filter": value}}}`.
pub(crate) fn results(value: &Value) -> Vec<CardResult> {
    let mut all = Vec::new();
    for (task, metrics) in value.get("results").and_then(Value::as_object).into_iter().flatten() {
        let metrics = metrics.as_object();
        let documents = metrics.and_then(|m| m.get("sample_len")).and_then(Value::as_u64);
        for (key, value) in metrics.into_iter().flatten() {
            let (metric, filter) = key.split_once(',').unwrap_or((key, "none"));
            let Some(value) = value.as_f64().filter(|v| v.is_finite()) else { continue };
            if metric.ends_with("_stderr") || !key.contains(',') {
                continue;
            }
            let stderr = metrics.and_then(|m| m.get(&format!("{metric}_stderr,{filter}"))).and_then(Value::as_f64);
            let metric = if filter == "none" { metric.to_owned() } else { format!("{metric} ({filter})") };
            all.push(CardResult { task: task.clone(), metric, value, stderr, documents });
        }
    }
    all
}

/// Splits a card into front matter and body; the front matter is empty if the card has none. Lines may end with a
/// carriage return, and the text may start with a byte order mark.
pub(crate) fn split(card: &str) -> (&str, &str) {
    let card = card.strip_prefix('\u{feff}').unwrap_or(card);
    let is_mark = |line: &str| line.trim_end() == "---";
    let mut lines = card.split_inclusive('\n');
    let Some(first) = lines.next().filter(|line| is_mark(line)) else { return ("", card) };
    let mut end = first.len();
    for line in lines {
        if is_mark(line) {
            return (&card[first.len()..end], &card[end + line.len()..]);
        }
        end += line.len();
    }
    ("", card)
}

/// Quotes a string. JSON strings are also valid YAML.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn data() -> CardData {
        CardData {
            license: Some("mit".to_owned()),
            base_model: vec!["o/m".to_owned()],
            tags: vec!["mine".to_owned(), "lora".to_owned()],
            library_name: Some("peft".to_owned()),
            name: "x".to_owned(),
            ..CardData::default()
        }
    }

    #[test]
    fn cards_of_any_system_are_split() {
        let whole = "---\nlicense: mit\n---\n# Text\n---\nmore";
        assert_eq!(split(whole), ("license: mit\n", "# Text\n---\nmore"));
        assert_eq!(split(&format!("\u{feff}{whole}")), split(whole));
        let (front, body) = ("license: mit\r\n", "# Text\r\n---\r\nmore");
        assert_eq!(split(&whole.replace('\n', "\r\n")), (front, body));
        assert_eq!(split("---\na: b\n---"), ("a: b\n", ""));
        assert_eq!(split("---\n---\nText"), ("", "Text"));
        for none in ["# Text\n---\nmore", "---\nno end", ""] {
            assert_eq!(split(none), ("", none));
        }
    }

    #[test]
    fn the_text_of_other_keys_is_kept() {
        let old = "# ours\nlanguage: no\nversion: 1.10\ntags: # a comment\n- mine\nbase_model: o/m\nlicense: \"mit\"\n\
                   extra: |\n  a: b\n  c\n";
        let old = FrontMatter::parse(old).unwrap();
        let expected = "---\n# ours\nlanguage: no\nversion: 1.10\ntags:\n- \"mine\"\n- \"lora\"\nbase_model: o/m\n\
                        license: \"mit\"\nextra: |\n  a: b\n  c\nlibrary_name: \"peft\"\n---\n";
        assert_eq!(data().united(&old), expected);
        // The keys of another style are written anew.
        let flow = FrontMatter::parse("{tags: [mine], extra: {a: 1}}").unwrap();
        let expected = "---\ntags:\n- \"mine\"\n- \"lora\"\n\"extra\": {\"a\":1}\nlicense: \"mit\"\nlibrary_name: \"peft\"\n\
                        base_model:\n- \"o/m\"\n---\n";
        assert_eq!(data().united(&flow), expected);
        assert!(FrontMatter::parse("a: [").is_err());
        assert!(FrontMatter::parse("\n# nothing\n").unwrap().values.is_empty());
    }

    #[test]
    fn scores_are_added_to_those_of_others() {
        let old = FrontMatter::parse("model-index:\n- name: y\n  results: []\n- name: x\n  results: []\n").unwrap();
        let json = json!({"results": {"t": {"sample_len": 20, "acc,none": 0.5, "acc_stderr,none": "N/A"}}});
        let result = results(&json).remove(0);
        assert_eq!((result.stderr, result.documents), (None, Some(20)));
        let text = CardData { results: vec![result], ..data() }.united(&old);
        assert!(
            text.contains("model-index:\n- {\"name\":\"y\",\"results\":[]}\n- name: \"x\"\n  results:\n  - task:"),
            "{text}"
        );
        assert!(text.contains("value: 0.5\n      name: \"acc (20 documents)\"\n"), "{text}");
        assert!(data().united(&old).contains("- name: y\n  results: []\n- name: x\n"));
    }
}
