use serde::{Deserialize, Serialize};

use crate::AdapterError;

/// Hyper-parameters of LoRA, in the words of PEFT's `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the update, at least 1.
    pub r: i64,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Probability with which an input element of the adapter is dropped while training, in `[0, 1)`.
    pub lora_dropout: f64,
    /// Which linear layers get an adapter.
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / √r` instead of `lora_alpha / r`.
    pub use_rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            use_rslora: false,
        }
    }
}

/// PEFT's `target_modules`: a list of names, `"all-linear"`, or a regular expression over the whole module name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Modules whose name is an entry or ends in `.entry`.
    Names(Vec<String>),
    /// `all-linear` (every linear layer but the output head), or a regular expression that matches the whole name.
    Pattern(String),
}

impl Default for TargetModules {
    fn default() -> Self {
        TargetModules::Pattern("all-linear".to_owned())
    }
}

impl LoraConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// [`AdapterError::Parameter`] names the key, the value and what is allowed.
    pub fn validate(&self) -> Result<(), AdapterError> {
        let parameter = |key, value: String, expected| Err(AdapterError::Parameter { key, value, expected });
        if self.r < 1 {
            return parameter("r", self.r.to_string(), "a rank of at least 1");
        }
        if !self.lora_alpha.is_finite() || self.lora_alpha <= 0.0 {
            return parameter("lora_alpha", self.lora_alpha.to_string(), "a positive number");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return parameter("lora_dropout", self.lora_dropout.to_string(), "a probability in [0, 1)");
        }
        if matches!(&self.target_modules, TargetModules::Names(names) if names.is_empty()) {
            return parameter("target_modules", "[]".to_owned(), "at least one name, or \"all-linear\"");
        }
        Ok(())
    }

    /// The factor in front of `B·A`.
    pub fn scaling(&self) -> f64 {
        if self.use_rslora { self.lora_alpha / (self.r as f64).sqrt() } else { self.lora_alpha / self.r as f64 }
    }
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
        ] {
            let config: LoraConfig = toml::from_str(text).unwrap();
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(key), "{message}");
        }
        assert!(toml::from_str::<LoraConfig>("rank = 4").is_err(), "unknown keys are refused");
    }

    #[test]
    fn scalings() {
        let plain = LoraConfig { r: 4, lora_alpha: 16.0, ..Default::default() };
        assert_eq!(plain.scaling(), 4.0);
        assert_eq!(LoraConfig { use_rslora: true, ..plain }.scaling(), 8.0);
    }
}
