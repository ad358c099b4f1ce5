//! Additional tensors of a PEFT adapter: fully trained modules and biases, biases of updates, and rows of single
//! tokens.

use serde_json::Value;

use crate::problem::AdapterProblem;
use crate::{Adapter, AdapterConfig, Error, TensorSource};

/// A tensor of an adapter that is neither a factor nor a magnitude.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beside {
    /// Name in the adapter's file.
    pub name: String,
    /// The tensor of the base that it replaces or changes.
    pub tensor: String,
    /// Its kind.
    pub kind: BesideKind,
}

/// Kind of an additional tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BesideKind {
    /// The base's weight after training (`modules_to_save`).
    Saved,
    /// The base's bias after training (`bias`).
    Bias,
    /// The update's own bias (`lora_bias`): multiplied by the module's scaling and added to the base's bias.
    UpdateBias {
        /// The module.
        module: String,
    },
    /// Rows of the base's embedding after training (`trainable_token_indices`), of shape `[ids, columns]`, for these
    /// token ids.
    Rows(Vec<usize>),
    /// A weight that the configuration does not mark as trained. PEFT stores the base's embedding if it has an adapter.
    Untrained,
}

const ROWS: &str = ".token_adapter.trainable_tokens_delta";
const UPDATE_BIAS: &str = ".lora_B.bias";
/// Names of the embedding and of the head, which may share one weight.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

impl Adapter {
    /// Returns every tensor that is neither factor nor magnitude, with its kind according to `adapter_config.json`.
    ///
    /// # Errors
    /// Returns [`Error::Adapter`] if tensors contradict the configuration, or if a trained module is missing from the
    /// file.
    pub fn beside(&self) -> Result<Vec<Beside>, Error> {
        let tensors: Result<Vec<Beside>, Error> =
            self.whole_tensors().into_iter().map(|(name, tensor)| self.kind_of(name, tensor)).collect();
        let tensors = tensors?;
        match self.lacks(&tensors) {
            None => Ok(tensors),
            Some((key, entry)) => Err(self.contradiction(AdapterProblem::MissingTrained { key, entry })),
        }
    }

    fn kind_of(&self, name: &str, tensor: String) -> Result<Beside, Error> {
        let config = self.config();
        let (tensor, kind) = if let Some(table) = tensor.strip_suffix(ROWS) {
            (format!("{table}.weight"), BesideKind::Rows(self.rows(name, table)?))
        } else if let Some(module) = tensor.strip_suffix(UPDATE_BIAS) {
            self.check_update_bias(name, module)?;
            (format!("{module}.bias"), BesideKind::UpdateBias { module: module.to_owned() })
        } else if config.is_saved(&tensor) {
            (tensor, BesideKind::Saved)
        } else if config.bias != "none" && tensor.ends_with(".bias") {
            (tensor, BesideKind::Bias)
        } else {
            (tensor, BesideKind::Untrained)
        };
        Ok(Beside { name: name.to_owned(), tensor, kind })
    }

    /// Returns the token ids of an embedding's trained rows.
    fn rows(&self, name: &str, table: &str) -> Result<Vec<usize>, Error> {
        let ids = self.config().token_ids(table);
        let shape = self.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if shape.len() == 2 && shape[0] == ids.len() && distinct.len() == ids.len() && !ids.is_empty() {
            return Ok(ids);
        }
        Err(self.contradiction(AdapterProblem::Rows { tensor: name.to_owned(), shape, ids: distinct.len() }))
    }

    fn check_update_bias(&self, name: &str, module: &str) -> Result<(), Error> {
        let shape = self.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let rows = self.modules().into_iter().find(|m| m.name == module).map(|m| m.b_shape[0]);
        let said = self.config().flag("lora_bias");
        if said && rows.is_some_and(|rows| shape == [rows]) {
            return Ok(());
        }
        Err(self.contradiction(AdapterProblem::UpdateBias { tensor: name.to_owned(), shape }))
    }

    /// Returns the first key whose trained tensors are missing, with its entry if it has several.
    fn lacks(&self, tensors: &[Beside]) -> Option<(&'static str, Option<String>)> {
        let config = self.config();
        let saved = config.modules_to_save.iter().flatten();
        let of = |entry: &String| tensors.iter().any(|t| t.kind == BesideKind::Saved && stands_in(&t.tensor, entry));
        if let Some(entry) = saved.into_iter().find(|entry| !of(entry)) {
            return Some(("modules_to_save", Some(entry.clone())));
        }
        let has = |kind: fn(&BesideKind) -> bool| tensors.iter().any(|t| kind(&t.kind));
        if config.holds("trainable_token_indices") && !has(|kind| matches!(kind, BesideKind::Rows(_))) {
            return Some(("trainable_token_indices", None));
        }
        let lacks_bias = config.flag("lora_bias") && !has(|kind| matches!(kind, BesideKind::UpdateBias { .. }));
        lacks_bias.then_some(("lora_bias", None))
    }

    fn contradiction(&self, problem: AdapterProblem) -> Error {
        Error::Adapter { path: self.dir().to_owned(), problem: Box::new(problem) }
    }
}

impl AdapterConfig {
    /// Whether an embedding and head that share one weight in the base stay tied during training, as PEFT does with
    /// `ensure_weight_tying`.
    pub fn ties_weights(&self) -> bool {
        self.flag("ensure_weight_tying")
    }

    fn flag(&self, key: &str) -> bool {
        self.other.get(key) == Some(&Value::Bool(true))
    }

    /// Whether a tensor of the base is in a module of `modules_to_save`. For a tied embedding and head, PEFT names only
    /// one.
    fn is_saved(&self, tensor: &str) -> bool {
        let entries = || self.modules_to_save.iter().flatten();
        let table = |name: &str| TABLES.iter().any(|table| stands_in(name, table));
        entries().any(|entry| stands_in(tensor, entry))
            || self.ties_weights() && table(tensor) && entries().any(|entry| table(&format!("{entry}.")))
    }

    /// Returns `trainable_token_indices` for a module: a list applies to the embedding; a map has lists by suffix of
    /// the name.
    fn token_ids(&self, table: &str) -> Vec<usize> {
        let list = |value: &Value| -> Vec<usize> {
            let ids = value.as_array().into_iter().flatten();
            ids.filter_map(|id| usize::try_from(id.as_u64()?).ok()).collect()
        };
        match self.other.get("trainable_token_indices") {
            Some(Value::Object(map)) => {
                let of = |key: &str| table == key || table.ends_with(&format!(".{key}"));
                map.iter().find(|(key, _)| of(key)).map_or(Vec::new(), |(_, value)| list(value))
            }
            Some(value) => list(value),
            None => Vec::new(),
        }
    }
}

/// PEFT's rule for `modules_to_save`: the tensor is inside a module whose name ends with the entry.
fn stands_in(tensor: &str, entry: &str) -> bool {
    tensor.match_indices('.').any(|(dot, _)| tensor[..dot].ends_with(entry))
}
