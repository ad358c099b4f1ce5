#![expect(clippy::mutable_key_type, reason = "patterns are ordered by their keys, which do not change")]

use std::collections::{BTreeMap, BTreeSet};

use cl_checkpoint::{LayerKind, ModulePattern, lora_scaling};
use cl_torch::Quantization;
use serde::{Deserialize, Serialize};

use crate::AdapterError;

/// Upper bound of ranks, larger than the width of any layer.
const MAX_RANK: i64 = 65_536;

/// LoRA hyperparameters, with the names of PEFT's `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the update, at least 1.
    pub r: i64,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Probability with which an input element of the adapter is dropped during training, in `[0, 1)`.
    pub lora_dropout: f64,
    /// Modules that get an adapter; `embed_tokens` and `lm_head` only if they are named.
    pub target_modules: TargetModules,
    /// Whether to scale by `lora_alpha / √r` instead of `lora_alpha / r` (rsLoRA, arXiv:2312.03732).
    pub use_rslora: bool,
    /// Whether to train direction and magnitude of each output separately (DoRA, arXiv:2402.09353).
    pub use_dora: bool,
    /// Initialization of the factors.
    pub init_lora_weights: InitLoraWeights,
    /// Ranks of modules that differ from `r`. A key is a regular expression for the end of a name, starting at a dot or
    /// at the start of the name; if several match, the longest key is used.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<ModulePattern, i64>,
    /// Alphas of modules that differ from `lora_alpha`, by the same rule.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<ModulePattern, f64>,
    /// Which biases of the base are trained.
    pub bias: Bias,
    /// Whether to train a bias for every update, `scaling · (B·A·x + b)`.
    pub lora_bias: bool,
    /// Modules that are trained and saved in full: all modules whose name ends in an entry, as in PEFT (`norm` matches
    /// every norm).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding or the output head are trained and saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable_token_indices: Option<TokenIndices>,
    /// Whether embedding and output head stay tied if `modules_to_save` names one of them; otherwise they are untied.
    pub ensure_weight_tying: bool,
    /// Ratio of the learning rate of B to that of A (LoRA+, arXiv:2402.12354).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
    /// Learning rate of everything trained in the embedding and the output head, before the schedule; defaults to that
    /// of the other parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_learning_rate: Option<f64>,
    /// Quantization format of the frozen weights of the base's linear layers during training (QLoRA, arXiv:2305.14314);
    /// the output head is not quantized. The saved adapter does not depend on the format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<Quantization>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: InitLoraWeights::default(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            bias: Bias::None,
            lora_bias: false,
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            ensure_weight_tying: false,
            loraplus_lr_ratio: None,
            embedding_learning_rate: None,
            base: None,
        }
    }
}

/// PEFT's `target_modules`: a list of names, `"all-linear"`, or a regular expression over the whole module name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Modules whose name is an entry or ends in `.entry`.
    Names(Vec<String>),
    /// `all-linear` (every linear layer except the output head and routers), or a regular expression that matches the
    /// whole name.
    Pattern(String),
}

impl Default for TargetModules {
    fn default() -> Self {
        TargetModules::Pattern("all-linear".to_owned())
    }
}

/// The biases of the base model that are trained in addition to the factors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// No biases.
    #[default]
    None,
    /// The biases of adapted layers.
    LoraOnly,
    /// All biases of the model.
    All,
}

/// PEFT's `trainable_token_indices`: token ids of the embedding, or ids per module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// For the embedding, and for the output head if it shares the embedding's weight.
    Embedding(Vec<i64>),
    /// By the last component of a module's name: `embed_tokens`, `lm_head`.
    Modules(BTreeMap<String, Vec<i64>>),
}

impl TokenIndices {
    /// Returns the ids for the module with this full name.
    pub fn of(&self, module: &str) -> &[i64] {
        let named = |entry: &str| module == entry || module.ends_with(&format!(".{entry}"));
        self.modules().into_iter().find(|(entry, _)| named(entry)).map_or(&[], |(_, ids)| ids)
    }

    /// Returns the modules with their ids; a plain list applies to the embedding.
    pub fn modules(&self) -> Vec<(&str, &[i64])> {
        match self {
            TokenIndices::Embedding(ids) => vec![("embed_tokens", ids)],
            TokenIndices::Modules(modules) => modules.iter().map(|(m, ids)| (m.as_str(), ids.as_slice())).collect(),
        }
    }
}

/// Initialization of the factors of a new adapter: PEFT's `init_lora_weights`.
///
/// With all variants except the last two, `B·A` is zero, so the layer's output is initially unchanged. The last two
/// initialize the factors from the weight. The weight stays unchanged, and the initial update is subtracted in the
/// forward pass. A saved adapter is then the difference from the initialization, at twice the rank, and applies to the
/// original base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Named", into = "Named")]
pub enum InitLoraWeights {
    /// `true`: A is uniform in ±1/√in, B is zero. For an embedding, A is zero and B standard normal.
    #[default]
    Kaiming,
    /// A is normal with standard deviation 1/r, B is zero.
    Gaussian,
    /// Rows of A and columns of B come from a random orthogonal matrix, so that `B·A` is zero although neither factor
    /// is. Even ranks only.
    Orthogonal,
    /// The r largest singular values and vectors of the weight (PiSSA, arXiv:2404.02948). With `pissa_niter_N`, they
    /// come from N rounds of subspace iteration instead of a full decomposition.
    Pissa {
        /// Number of rounds of subspace iteration.
        niter: Option<u32>,
    },
    /// The first r columns and rows of the weight's QR decomposition (OLoRA, arXiv:2406.01775).
    Olora,
}

/// The value as in a file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Named {
    Flag(bool),
    Name(String),
}

impl TryFrom<Named> for InitLoraWeights {
    type Error = String;

    fn try_from(value: Named) -> Result<Self, String> {
        let name = match value {
            Named::Flag(true) => return Ok(InitLoraWeights::Kaiming),
            Named::Flag(false) => "false".to_owned(),
            Named::Name(name) => name,
        };
        match name.as_str() {
            "gaussian" => Ok(InitLoraWeights::Gaussian),
            "orthogonal" => Ok(InitLoraWeights::Orthogonal),
            "pissa" => Ok(InitLoraWeights::Pissa { niter: None }),
            "olora" => Ok(InitLoraWeights::Olora),
            other => match other.strip_prefix("pissa_niter_").and_then(|n| n.parse().ok()) {
                Some(niter) => Ok(InitLoraWeights::Pissa { niter: Some(niter) }),
                None => Err(format!(
                    "init_lora_weights = {other}: expected true, \"gaussian\", \"orthogonal\", \"pissa\", \
                     \"pissa_niter_N\" or \"olora\""
                )),
            },
        }
    }
}

impl From<InitLoraWeights> for Named {
    fn from(init: InitLoraWeights) -> Named {
        match init {
            InitLoraWeights::Kaiming => Named::Flag(true),
            InitLoraWeights::Gaussian => Named::Name("gaussian".to_owned()),
            InitLoraWeights::Orthogonal => Named::Name("orthogonal".to_owned()),
            InitLoraWeights::Pissa { niter: None } => Named::Name("pissa".to_owned()),
            InitLoraWeights::Pissa { niter: Some(n) } => Named::Name(format!("pissa_niter_{n}")),
            InitLoraWeights::Olora => Named::Name("olora".to_owned()),
        }
    }
}

impl InitLoraWeights {
    /// Whether the initial update is not zero and is therefore subtracted in the forward pass.
    pub fn changes_the_base(self) -> bool {
        matches!(self, InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora)
    }
}

impl LoraConfig {
    /// Checks all ranges.
    ///
    /// # Errors
    /// Returns [`AdapterError::Parameter`] with the key, the value and the allowed values.
    pub fn validate(&self) -> Result<(), AdapterError> {
        let parameter = |key, value: String, expected| Err(AdapterError::Parameter { key, value, expected });
        let positive = |x: f64| x.is_finite() && x > 0.0 && x <= 1e6;
        if !(1..=MAX_RANK).contains(&self.r) {
            return parameter("r", self.r.to_string(), "a rank of at least 1, at most 65,536");
        }
        if !positive(self.lora_alpha) {
            return parameter("lora_alpha", self.lora_alpha.to_string(), "a positive number, at most 1e6");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return parameter("lora_dropout", self.lora_dropout.to_string(), "a probability in [0, 1)");
        }
        if matches!(&self.target_modules, TargetModules::Names(names) if names.is_empty()) {
            return parameter("target_modules", "[]".to_owned(), "at least one name, or \"all-linear\"");
        }
        if let Some((key, rank)) = self.rank_pattern.iter().find(|(_, rank)| !(1..=MAX_RANK).contains(*rank)) {
            return parameter("rank_pattern", format!("{} = {rank}", key.key()), "ranks of at least 1, at most 65,536");
        }
        if let Some((key, alpha)) = self.alpha_pattern.iter().find(|(_, alpha)| !positive(**alpha)) {
            return parameter("alpha_pattern", format!("{} = {alpha}", key.key()), "positive numbers");
        }
        if let Some(key) = self.rank_pattern.keys().chain(self.alpha_pattern.keys()).find(|key| key.error().is_some()) {
            return parameter("rank_pattern, alpha_pattern", key.key().to_owned(), "a regular expression");
        }
        if self.init_lora_weights == InitLoraWeights::Orthogonal
            && let Some(odd) = self.rank_pattern.values().chain([&self.r]).find(|r| *r % 2 == 1)
        {
            return parameter("r", odd.to_string(), "an even rank with init_lora_weights = \"orthogonal\"");
        }
        if self.use_dora && self.init_lora_weights.changes_the_base() {
            return parameter("use_dora", "true".to_owned(), "another init_lora_weights than pissa or olora");
        }
        if self.lora_bias && (self.use_dora || self.init_lora_weights != InitLoraWeights::Kaiming) {
            let expected = "false with use_dora, or with another init_lora_weights than true";
            return parameter("lora_bias", "true".to_owned(), expected);
        }
        for (module, ids) in self.trainable_token_indices.iter().flat_map(TokenIndices::modules) {
            let distinct: BTreeSet<&i64> = ids.iter().collect();
            if ids.is_empty() || distinct.len() < ids.len() || ids.iter().any(|id| *id < 0) {
                let value = format!("{ids:?} for `{module}`");
                return parameter("trainable_token_indices", value, "ids of 0 or more, each once");
            }
        }
        for (key, value) in
            [("loraplus_lr_ratio", self.loraplus_lr_ratio), ("embedding_learning_rate", self.embedding_learning_rate)]
        {
            if let Some(value) = value.filter(|v| !positive(*v)) {
                return parameter(key, value.to_string(), "a positive number");
            }
        }
        Ok(())
    }

    /// Checks settings against the layers that get an adapter (names, kinds and weight shapes): rejects settings that
    /// one of them does not support, and settings that would have no effect.
    ///
    /// # Errors
    /// Returns [`AdapterError::Parameter`].
    pub fn check_layers(&self, layers: &[(&str, LayerKind, [i64; 2])]) -> Result<(), AdapterError> {
        layers.iter().try_for_each(|(name, kind, shape)| self.check_layer(name, *kind, *shape))?;
        let ranks = self.rank_pattern.keys().map(|key| ("rank_pattern", key));
        let mut patterns = ranks.chain(self.alpha_pattern.keys().map(|key| ("alpha_pattern", key)));
        let idle = |key: &ModulePattern| key.error().is_none() && !layers.iter().any(|(name, ..)| key.is_match(name));
        if let Some((key, pattern)) = patterns.find(|(_, pattern)| idle(pattern)) {
            let expected = "the end of a name among the adapted layers";
            return Err(AdapterError::Parameter { key, value: format!("`{}`", pattern.key()), expected });
        }
        let of_tokens = |name: &str, kind| kind == LayerKind::Embedding || name == "lm_head";
        let whole = |entry: &String| ["embed_tokens", "lm_head"].iter().any(|m| entry.ends_with(m));
        if let Some(rate) = self.embedding_learning_rate
            && self.trainable_token_indices.is_none()
            && !self.modules_to_save.iter().any(whole)
            && !layers.iter().any(|(name, kind, _)| of_tokens(name, *kind))
        {
            let expected = "embed_tokens or lm_head among target_modules or modules_to_save";
            return Err(AdapterError::Parameter { key: "embedding_learning_rate", value: rate.to_string(), expected });
        }
        Ok(())
    }

    /// Checks that a layer with a weight of this shape supports the settings.
    pub(crate) fn check_layer(&self, name: &str, kind: LayerKind, shape: [i64; 2]) -> Result<(), AdapterError> {
        let wrong = |key, value: String, expected| Err(AdapterError::Parameter { key, value, expected });
        let set = || format!("set for `{name}`");
        if self.lora_bias && kind == LayerKind::Embedding {
            return wrong("lora_bias", set(), "target_modules without the embedding");
        }
        if self.use_dora && (kind == LayerKind::Embedding || name == "lm_head") {
            return wrong("use_dora", set(), "target_modules without embedding and head");
        }
        // With a rank above the larger side, the factors would be larger than two matrices of the layer's size.
        let rank = self.rank(name);
        if rank > shape[0].max(shape[1]) {
            return wrong("r", format!("{rank} for `{name}`"), "no more than the layer's larger side");
        }
        if !self.init_lora_weights.changes_the_base() {
            return Ok(());
        }
        if kind == LayerKind::Embedding {
            return wrong("init_lora_weights", set(), "target_modules without the embedding");
        }
        if rank > shape[0].min(shape[1]) {
            return wrong("r", format!("{rank} for `{name}`"), "no more than the layer's width");
        }
        Ok(())
    }

    /// Returns the key of a setting that trains parameters in addition to the factors, if there is one: such adapters
    /// cannot be summed.
    pub fn beyond_factors(&self) -> Option<&'static str> {
        let keys = [
            ("use_dora", self.use_dora),
            ("modules_to_save", !self.modules_to_save.is_empty()),
            ("bias", self.bias != Bias::None),
            ("lora_bias", self.lora_bias),
            ("trainable_token_indices", self.trainable_token_indices.is_some()),
        ];
        keys.into_iter().find(|(_, set)| *set).map(|(key, _)| key)
    }

    /// Returns the rank of a module, including `rank_pattern`.
    pub fn rank(&self, module: &str) -> i64 {
        pattern(&self.rank_pattern, module).unwrap_or(self.r)
    }

    /// Returns the scaling of a module's `B·A`: `alpha / r`, or `alpha / √r` with rsLoRA, including patterns.
    pub fn scaling(&self, module: &str) -> f64 {
        let alpha = pattern(&self.alpha_pattern, module).unwrap_or(self.lora_alpha);
        lora_scaling(alpha, self.rank(module) as f64, self.use_rslora)
    }
}

/// Finds the value whose key matches a module by PEFT's rule; since tables are unordered, the longest matching key is
/// used.
fn pattern<V: Copy>(pairs: &BTreeMap<ModulePattern, V>, module: &str) -> Option<V> {
    let matching = pairs.iter().filter(|(key, _)| key.is_match(module));
    matching.max_by_key(|(key, _)| key.key().len()).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (text, key) in [
            ("r = 0", "r"),
            ("lora_alpha = -1.0", "lora_alpha"),
            ("lora_dropout = 1.0", "lora_dropout"),
            ("target_modules = []", "target_modules"),
            ("rank_pattern = {q_proj = 0}", "rank_pattern"),
            ("alpha_pattern = {'(' = 1.0}", "rank_pattern, alpha_pattern"),
            ("alpha_pattern = {q_proj = 0.0}", "alpha_pattern"),
            ("r = 3\ninit_lora_weights = 'orthogonal'", "r"),
            ("use_dora = true\ninit_lora_weights = 'pissa'", "use_dora"),
            ("lora_bias = true\nuse_dora = true", "lora_bias"),
            ("lora_bias = true\ninit_lora_weights = 'gaussian'", "lora_bias"),
            ("trainable_token_indices = [3, 3]", "trainable_token_indices"),
            ("trainable_token_indices = []", "trainable_token_indices"),
            ("trainable_token_indices = {lm_head = [-1]}", "trainable_token_indices"),
            ("loraplus_lr_ratio = 0.0", "loraplus_lr_ratio"),
            ("embedding_learning_rate = -1e-5", "embedding_learning_rate"),
        ] {
            let config: LoraConfig = toml::from_str(text).unwrap();
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(key), "{message}");
        }
        assert!(toml::from_str::<LoraConfig>("rank = 4").is_err(), "unknown keys are refused");
        let unknown = toml::from_str::<LoraConfig>("init_lora_weights = 'corda'").unwrap_err().to_string();
        assert!(unknown.contains("corda") && unknown.contains("gaussian"), "{unknown}");
        let unknown = toml::from_str::<LoraConfig>("base = 'fp4'").unwrap_err().to_string();
        assert!(["fp4", "nf4", "int8"].iter().all(|name| unknown.contains(name)), "{unknown}");
    }

    #[test]
    fn scalings() {
        let plain = LoraConfig { r: 4, lora_alpha: 16.0, ..Default::default() };
        assert_eq!(plain.scaling("q_proj"), 4.0);
        assert_eq!(LoraConfig { use_rslora: true, ..plain }.scaling("q_proj"), 8.0);
    }

    #[test]
    fn patterns_and_ways_to_start_read_back() {
        let text = "r = 4\ninit_lora_weights = 'pissa_niter_4'\n[rank_pattern]\nq_proj = 2\n'layers.1.self_attn.q_proj' = 6\n\
                    [alpha_pattern]\nq_proj = 8.0\n";
        let config: LoraConfig = toml::from_str(text).unwrap();
        assert_eq!(config.init_lora_weights, InitLoraWeights::Pissa { niter: Some(4) });
        assert_eq!(config.rank("model.layers.0.self_attn.q_proj"), 2);
        assert_eq!(config.rank("model.layers.1.self_attn.q_proj"), 6);
        assert_eq!(config.rank("model.layers.1.self_attn.v_proj"), 4);
        assert_eq!(config.scaling("model.layers.0.self_attn.q_proj"), 4.0);
        assert_eq!(toml::from_str::<LoraConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
        for init in ["true", "'gaussian'", "'orthogonal'", "'pissa'", "'olora'"] {
            let config: LoraConfig = toml::from_str(&format!("init_lora_weights = {init}")).unwrap();
            assert_eq!(toml::from_str::<LoraConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
        }
    }
}
