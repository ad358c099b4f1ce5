use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::problem::AdapterProblem;
use crate::{ModulePattern, ordered_map};

/// PEFT's `adapter_config.json`. Field names are its keys; keys that are not listed here are kept unchanged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// `LORA` for low-rank adapters.
    pub peft_type: String,
    /// The task, `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Name or path of the base model.
    pub base_model_name_or_path: Option<String>,
    /// Whether PEFT loads the adapter frozen.
    pub inference_mode: bool,
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling factor.
    pub lora_alpha: f64,
    /// Dropout applied to A's input during training.
    pub lora_dropout: f64,
    /// The modules that have an adapter.
    pub target_modules: Option<TargetModules>,
    /// Whether to scale by `lora_alpha / √r` (rsLoRA).
    pub use_rslora: bool,
    /// Whether adapters are weight-decomposed (DoRA).
    pub use_dora: bool,
    /// Which biases were trained: `none`, `all` or `lora_only`.
    pub bias: String,
    /// Whether weights are stored transposed.
    pub fan_in_fan_out: bool,
    /// Modules that are trained in full and stored.
    pub modules_to_save: Option<Vec<String>>,
    /// How the factors were initialized.
    pub init_lora_weights: Value,
    /// Ranks of modules that differ from `r`, by pattern; the first matching pattern applies.
    #[serde(with = "ordered_map")]
    pub rank_pattern: Vec<(ModulePattern, usize)>,
    /// Alphas of modules that differ from `lora_alpha`, by pattern; the first matching pattern applies.
    #[serde(with = "ordered_map")]
    pub alpha_pattern: Vec<(ModulePattern, f64)>,
    /// All other keys.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// Keys that change what an adapter computes, unless they are null, false or empty. [`Adapter`](crate::Adapter) replaces
/// `target_parameters` by modules.
const CHANGE_THE_MEANING: [&str; 8] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
];

/// Initializations that subtract the initial update from the base weight, so that it differs from the base model's.
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// A list of names, or a string (`all-linear` or a regular expression).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Names, or suffixes of names.
    List(Vec<String>),
    /// `all-linear`, or a regular expression over the whole name.
    Pattern(String),
}

impl Default for AdapterConfig {
    fn default() -> Self {
        AdapterConfig {
            peft_type: "LORA".to_owned(),
            task_type: None,
            base_model_name_or_path: None,
            inference_mode: false,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            use_rslora: false,
            use_dora: false,
            bias: "none".to_owned(),
            fan_in_fan_out: false,
            modules_to_save: None,
            init_lora_weights: Value::Bool(true),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            other: BTreeMap::new(),
        }
    }
}

impl AdapterConfig {
    /// Returns the rank of a module, including `rank_pattern`.
    pub fn rank(&self, module: &str) -> usize {
        pattern(&self.rank_pattern, module).unwrap_or(self.r)
    }

    /// Returns the scaling of a module's `B·A`: `alpha / r`, or `alpha / √r` with rsLoRA, including patterns.
    ///
    /// ```
    /// use cl_checkpoint::AdapterConfig;
    /// let config = AdapterConfig { r: 4, lora_alpha: 8.0, use_rslora: true, ..Default::default() };
    /// assert_eq!(config.scaling("model.layers.0.self_attn.q_proj"), 4.0);
    /// ```
    pub fn scaling(&self, module: &str) -> f64 {
        lora_scaling(self.alpha(module), self.rank(module) as f64, self.use_rslora)
    }

    /// Returns the alpha of a module, including `alpha_pattern`.
    pub(crate) fn alpha(&self, module: &str) -> f64 {
        pattern(&self.alpha_pattern, module).unwrap_or(self.lora_alpha)
    }

    /// Returns the name of the first unsupported feature, if there is one. Factors, magnitudes, fully trained modules,
    /// biases and token rows are supported.
    pub fn not_built(&self) -> Option<String> {
        let start = self.init_lora_weights.as_str().unwrap_or_default().to_lowercase();
        if self.peft_type != "LORA" {
            Some(self.peft_type.clone())
        } else if self.fan_in_fan_out {
            Some("fan_in_fan_out".to_owned())
        } else if CHANGE_THE_BASE.iter().any(|s| start.starts_with(s)) {
            Some(format!("init_lora_weights = \"{start}\""))
        } else {
            CHANGE_THE_MEANING.iter().find(|key| self.holds(key)).map(|key| (*key).to_owned())
        }
    }

    pub(crate) fn holds(&self, key: &str) -> bool {
        match self.other.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        }
    }

    /// Returns what is wrong with ranks or patterns; `None` if they are valid.
    pub(crate) fn problem(&self) -> Option<AdapterProblem> {
        if self.r == 0 {
            return Some(AdapterProblem::RankZero);
        }
        if let Some((key, _)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return Some(AdapterProblem::PatternRankZero { key: key.key().to_owned() });
        }
        let ranks = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        let mut patterns = ranks.chain(self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key)));
        patterns.find_map(|(map, key)| {
            let source = key.error()?.clone();
            Some(AdapterProblem::Pattern { map, key: key.key().to_owned(), source })
        })
    }
}

/// Finds a module's value by PEFT's rule: the first matching key applies.
fn pattern<V: Copy>(pairs: &[(ModulePattern, V)], module: &str) -> Option<V> {
    pairs.iter().find(|(key, _)| key.is_match(module)).map(|(_, value)| *value)
}

/// Returns the scaling `alpha / rank`, or `alpha / √rank` with rsLoRA.
pub fn lora_scaling(alpha: f64, rank: f64, use_rslora: bool) -> f64 {
    if use_rslora { alpha / rank.sqrt() } else { alpha / rank }
}

/// Returns the alpha that gives this scaling at a rank. If it is an integer up to rounding errors of f64, it is that
/// integer, because most alphas are.
pub fn alpha_for(scaling: f64, rank: usize, use_rslora: bool) -> f64 {
    let alpha = scaling / lora_scaling(1.0, rank as f64, use_rslora);
    if nearly(alpha, alpha.round()) { alpha.round() } else { alpha }
}

/// Whether two numbers are equal up to a few rounding errors of f64.
pub(crate) fn nearly(a: f64, b: f64) -> bool {
    (a - b).abs() <= 8.0 * f64::EPSILON * a.abs()
}

/// Returns `target_modules` for these modules: the last parts of their names, or full names if the last part would also
/// match other modules of the model.
pub fn target_names(adapted: &[&str], others: &[&str]) -> Vec<String> {
    fn last(name: &str) -> &str {
        name.rsplit('.').next().unwrap_or(name)
    }
    let exact = adapted.iter().all(|a| others.iter().all(|o| last(a) != last(o)));
    let mut names: Vec<String> = adapted.iter().map(|a| if exact { last(a) } else { a }.to_owned()).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_ends_of_names() {
        let json = r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"],
            "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 4}, "alpha_pattern": {"q_proj": 6}, "lora_bias": false}"#;
        let config: AdapterConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.scaling("model.layers.0.self_attn.q_proj"), 3.0);
        assert_eq!(config.scaling("model.layers.1.mlp.up_proj"), 4.0);
        assert_eq!(config.scaling("model.layers.11.mlp.up_proj"), 2.0);
        assert_eq!(config.scaling("model.layers.0.self_attn.xq_proj"), 2.0);
        assert_eq!(serde_json::to_value(&config).unwrap()["lora_bias"], false, "unknown keys are kept");
    }
}
