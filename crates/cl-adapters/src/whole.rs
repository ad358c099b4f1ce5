//! Parameters that an adapter trains in addition to its LoRA factors: whole modules, biases, and individual token rows.

use std::collections::{BTreeMap, BTreeSet};

use cl_torch::tch::{Kind, Tensor};

use crate::{AdapterError, Bias, LoraConfig};

/// The tensors of the base model that an adapter trains in full, and the tokens whose rows it trains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WholePlan {
    /// Names of the tensors of `modules_to_save`, in order.
    pub saved: Vec<String>,
    /// Whether `saved` contains embedding and output head as one tied tensor.
    pub tied: bool,
    /// Names of the trained biases, in order.
    pub biases: Vec<String>,
    /// Ids of the tokens whose rows are trained, by module. A head that shares the embedding's weight is included
    /// implicitly.
    pub tokens: BTreeMap<String, Vec<i64>>,
}

/// A tensor of an adapter that is neither a factor nor a magnitude.
pub struct Whole {
    /// Name in the adapter's file, without `base_model.model.`.
    pub name: String,
    /// Values of the tensor.
    pub tensor: Tensor,
    /// Kind of the tensor.
    pub kind: WholeKind,
}

/// Kind of an adapter's tensor that is neither a factor nor a magnitude.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WholeKind {
    /// A tensor of a module in `modules_to_save`.
    Saved,
    /// A bias of the base model.
    Bias,
    /// Rows of a module's weight for these tokens.
    Tokens(Vec<i64>),
}

const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

impl LoraConfig {
    /// Plans the fully trained tensors of a model with the given tensors (names and shapes, including a tied output
    /// head). Checks that every setting has an effect and that no tensor is trained twice. `adapted` are the layers
    /// with factors; `tied` means that embedding and output head share their weight.
    ///
    /// # Errors
    /// Returns [`AdapterError::Parameter`] with the invalid key.
    pub fn whole_plan(
        &self,
        tensors: &[(&str, &[i64])],
        adapted: &[&str],
        tied: bool,
    ) -> Result<WholePlan, AdapterError> {
        let names: Vec<&str> = tensors.iter().map(|(name, _)| *name).collect();
        let as_one = tied && self.ensure_weight_tying;
        if let Some(layer) = adapted.iter().find(|layer| as_one && [EMBEDDING, HEAD].contains(layer)) {
            let (key, value) = ("ensure_weight_tying", format!("true, with an adapter on `{layer}`"));
            let expected = "target_modules without embed_tokens and lm_head, or modules_to_save with them";
            return Err(AdapterError::Parameter { key, value, expected });
        }
        let mut saved = self.saved_tensors(&names, adapted)?;
        let both = [EMBEDDING, HEAD].map(|module| format!("{module}.weight"));
        let as_one = as_one && both.iter().any(|weight| saved.contains(weight));
        if as_one {
            saved.extend(both);
        }
        let is_bias = |name: &str| match self.bias {
            Bias::None => false,
            Bias::All => name.ends_with(".bias"),
            Bias::LoraOnly => name.strip_suffix(".bias").is_some_and(|module| adapted.contains(&module)),
        };
        let biases = names.into_iter().filter(|name| is_bias(name) && !saved.contains(*name));
        let biases: BTreeSet<String> = biases.map(str::to_owned).collect();
        let taken = saved.iter().filter_map(|name| Some(name.rsplit_once('.')?.0)).chain(adapted.iter().copied());
        let tokens = self.token_rows(tensors, &taken.collect::<Vec<_>>(), tied)?;
        Ok(WholePlan { saved: saved.into_iter().collect(), tied: as_one, biases: biases.into_iter().collect(), tokens })
    }

    /// Whether a layer is saved in full or belongs to a module that is. Such a layer has no factors, even if it is a
    /// target.
    pub fn is_saved(&self, layer: &str) -> bool {
        let padded = format!(".{layer}.");
        self.modules_to_save.iter().any(|entry| padded.contains(&format!(".{entry}.")))
    }

    /// Tensors of modules whose name ends in an entry, and of modules within them.
    fn saved_tensors(&self, names: &[&str], adapted: &[&str]) -> Result<BTreeSet<String>, AdapterError> {
        let wrong = |value: String, expected| {
            Err(AdapterError::Parameter { key: "modules_to_save", value: format!("`{value}`"), expected })
        };
        let mut saved = BTreeSet::new();
        for entry in &self.modules_to_save {
            let covered: Vec<&str> = names.iter().copied().filter(|name| stands_in(name, entry)).collect();
            if entry.is_empty() || covered.is_empty() {
                return wrong(entry.clone(), "the end of a module's name, such as embed_tokens, lm_head or norm");
            }
            if let Some(layer) = adapted.iter().find(|layer| stands_in(&format!("{layer}."), entry)) {
                return wrong(format!("{entry}` with `{layer}"), "modules without an adapter in them");
            }
            saved.extend(covered.into_iter().map(str::to_owned));
        }
        Ok(saved)
    }

    fn token_rows(
        &self,
        tensors: &[(&str, &[i64])],
        taken: &[&str],
        tied: bool,
    ) -> Result<BTreeMap<String, Vec<i64>>, AdapterError> {
        let wrong =
            |value: String, expected| Err(AdapterError::Parameter { key: "trainable_token_indices", value, expected });
        let mut rows = BTreeMap::new();
        for (entry, ids) in self.trainable_token_indices.iter().flat_map(|t| t.modules()) {
            let Some(module) = [EMBEDDING, HEAD].into_iter().find(|m| *m == entry || m.ends_with(&format!(".{entry}")))
            else {
                return wrong(format!("for `{entry}`"), "embed_tokens or lm_head");
            };
            if taken.contains(&module) {
                return wrong(format!("for `{module}`"), "a module without adapter that is not in modules_to_save");
            }
            let weight = format!("{module}.weight");
            let count = tensors.iter().find(|(name, _)| *name == weight).map_or(0, |(_, shape)| shape[0]);
            if let Some(id) = ids.iter().find(|id| **id >= count) {
                return wrong(format!("{id} for `{module}`"), "ids of the vocabulary");
            }
            rows.insert(module.to_owned(), ids.to_vec());
        }
        if tied && rows.contains_key(EMBEDDING) && rows.contains_key(HEAD) {
            if rows[EMBEDDING] == rows[HEAD] {
                rows.remove(HEAD);
            } else if self.ensure_weight_tying {
                return wrong("ids that differ".to_owned(), "the same ids for both with ensure_weight_tying");
            }
        }
        Ok(rows)
    }
}

/// Whether the name of a module that contains this tensor ends in `entry`.
pub(crate) fn stands_in(tensor: &str, entry: &str) -> bool {
    tensor.match_indices('.').any(|(dot, _)| tensor[..dot].ends_with(entry))
}

/// Rows of an embedding that are trained and replace those of the embedding.
pub struct TokenRows {
    /// Ids of the tokens.
    pub ids: Vec<i64>,
    /// Trained rows, `[ids, width]`, f32.
    pub values: Tensor,
    /// The token ids, as a tensor on the device.
    places: Tensor,
    /// For every token of the vocabulary, its row in `values`, or −1.
    slots: Tensor,
}

impl TokenRows {
    /// Creates trainable rows for `ids` of `table` `[tokens, width]`, with the given values or the table's.
    pub(crate) fn new(table: &Tensor, ids: &[i64], values: Option<Tensor>) -> TokenRows {
        let places = Tensor::from_slice(ids).to_device(table.device());
        let counted = Tensor::arange(ids.len() as i64, (Kind::Int64, table.device()));
        let slots =
            Tensor::full([table.size()[0]], -1, (Kind::Int64, table.device())).index_copy_(0, &places, &counted);
        let values = values.unwrap_or_else(|| table.index_select(0, &places)).to_kind(Kind::Float);
        TokenRows { ids: ids.to_vec(), values: leaf(&values), places, slots }
    }

    /// Replaces rows of trained tokens in `x` `[tokens, width]`, which contains the table's rows of `ids`.
    pub(crate) fn replace(&self, x: &Tensor, ids: &Tensor) -> Tensor {
        let slots = self.slots.index_select(0, &ids.flatten(0, -1));
        let own = self.values.index_select(0, &slots.clamp_min(0)).to_kind(x.kind());
        own.where_self(&slots.ge(0).unsqueeze(-1), x)
    }

    /// Computes `h·valuesᵀ`, `[rows, ids]`: the columns of the logits for the trained tokens.
    pub fn logits(&self, h: &Tensor) -> Tensor {
        cl_torch::linear(h, &self.values.to_kind(h.kind()), None)
    }

    /// Returns the indices of these columns.
    pub fn places(&self) -> &Tensor {
        &self.places
    }

    /// Returns a second handle to the same tensors.
    pub fn shallow_clone(&self) -> TokenRows {
        TokenRows {
            ids: self.ids.clone(),
            values: self.values.shallow_clone(),
            places: self.places.shallow_clone(),
            slots: self.slots.shallow_clone(),
        }
    }
}

/// Returns a trainable f32 copy.
pub fn leaf(t: &Tensor) -> Tensor {
    t.detach().to_kind(Kind::Float).copy().set_requires_grad(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MATRIX: &[i64] = &[61, 16];
    const TENSORS: [(&str, &[i64]); 6] = [
        ("lm_head.weight", MATRIX),
        ("model.embed_tokens.weight", MATRIX),
        ("model.layers.0.mlp.up_proj.weight", MATRIX),
        ("model.layers.0.mlp.up_proj.bias", &[61]),
        ("model.layers.0.input_layernorm.weight", &[16]),
        ("model.norm.weight", &[16]),
    ];

    fn plan(text: &str) -> Result<WholePlan, String> {
        let config: LoraConfig = toml::from_str(text).unwrap();
        config.whole_plan(&TENSORS, &["model.layers.0.mlp.up_proj"], true).map_err(|e| e.to_string())
    }

    #[test]
    fn names_match_as_in_peft() {
        let saved = |entry: &str| plan(&format!("modules_to_save = ['{entry}']")).unwrap().saved;
        assert_eq!(saved("embed_tokens"), ["model.embed_tokens.weight"]);
        assert_eq!(saved("norm"), ["model.layers.0.input_layernorm.weight", "model.norm.weight"]);
        assert_eq!(saved("0.input_layernorm"), ["model.layers.0.input_layernorm.weight"]);
        let biases = |bias: &str| plan(&format!("bias = '{bias}'")).unwrap().biases;
        assert_eq!(biases("lora_only"), ["model.layers.0.mlp.up_proj.bias"]);
        assert_eq!(biases("all"), ["model.layers.0.mlp.up_proj.bias"]);
        assert!(biases("none").is_empty());
        let tokens = plan("trainable_token_indices = [5, 60]").unwrap().tokens;
        assert_eq!(tokens, BTreeMap::from([("model.embed_tokens".to_owned(), vec![5, 60])]));
        let of_both =
            |head| plan(&format!("trainable_token_indices = {{embed_tokens = [5], lm_head = [{head}]}}")).unwrap();
        assert_eq!((of_both(5).tokens.len(), of_both(6).tokens.len()), (1, 2), "the same ids are one tensor");
        let tied = plan("modules_to_save = ['lm_head']\nensure_weight_tying = true").unwrap();
        assert_eq!((tied.saved.len(), tied.tied), (2, true));
    }

    #[test]
    fn what_would_not_be_trained_is_refused() {
        for (text, part) in [
            ("modules_to_save = ['emed_tokens']", "`emed_tokens`"),
            ("modules_to_save = ['mlp']", "`mlp` with `model.layers.0.mlp.up_proj`"),
            (
                "trainable_token_indices = {embed_tokens = [5], lm_head = [6]}\nensure_weight_tying = true",
                "the same ids",
            ),
            ("trainable_token_indices = [61]", "61 for `model.embed_tokens`"),
            ("trainable_token_indices = {up_proj = [3]}", "for `up_proj`"),
            ("modules_to_save = ['lm_head']\ntrainable_token_indices = {lm_head = [3]}", "for `lm_head`"),
        ] {
            let message = plan(text).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
