//! The structure of a merge file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::parameter::Parameter;
use super::tokenizer::TokenizerConfig;
use crate::flag::Flag;
use crate::methods::{Divisor, Election, Profile, Projection, Rescale, Trimmed};

/// A merge file: one merge, or several stages, of which later ones can use earlier ones as models.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeFile {
    /// The stages, in order; the last one is the result.
    pub stages: Vec<MergeConfig>,
}

/// One merge. Paths are relative to the current directory.
///
/// ```
/// use cl_merge::MergeFile;
/// let file = MergeFile::from_toml(r#"
///     base_model = "base"
///     [method.ties]
///     density = 0.2
///     [[models]]
///     model = "tuned/law"
///     [[models]]
///     model = "tuned/code"
///     weight = 0.5
/// "#)?;
/// assert_eq!(file.stages[0].method.name, "ties");
/// # Ok::<(), cl_merge::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeConfig {
    /// Name by which later stages refer to this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The method and its parameters.
    pub method: MethodConfig,
    /// Which definitions are the defaults where tools differ.
    #[serde(default)]
    pub profile: Profile,
    /// Model directory from which task vectors are computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// The models.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelConfig>,
    /// Instead of `models`: ranges of layers, stacked in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slices: Vec<SliceConfig>,
    /// Dtype of the output: `float32`, `float16` or `bfloat16`; by default, each tensor keeps that of the base, or of
    /// the first model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<FloatType>,
    /// Random seed of masks.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Source of the tokenizer files: `base`, or one of the models by its path or name. By default the base, or else
    /// the first model. Embeddings are not reordered to match, see `tokenizer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_source: Option<String>,
    /// The tokens of the output, if models have different ones; embeddings are reordered to match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerConfig>,
    /// The chat template of the output: `auto` for that of most models, a model by its path or name for its own, or the
    /// text. By default, that of the tokenizer's model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Policy for embedding rows that not all models have.
    #[serde(default)]
    pub vocabulary: Vocabulary,
    /// Policy for tensors that not all models have.
    #[serde(default, skip_serializing_if = "ExtraTensors::is_default")]
    pub extra_tensors: ExtraTensors,
    /// Whether to merge embedding rows by index even if tokenizers differ.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_tokenizers: bool,
    /// Commits of models and adapters from the Hub, by their names in the file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub revisions: BTreeMap<String, String>,
    /// Directories of their files, see [`MergeFile::place`]; not part of the file.
    #[serde(skip)]
    pub places: BTreeMap<String, PathBuf>,
    /// Whether parameters that only other methods of mergekit have are ignored with a note, as in mergekit, instead of
    /// being errors. Set for mergekit's YAML; not part of the file.
    #[serde(skip)]
    pub ignore_parameters_of_others: bool,
    /// Notes on keys of mergekit's YAML that have no effect. They precede the plan's other notes and are not part of
    /// the file.
    #[serde(skip)]
    pub notes: Vec<String>,
}

fn seed() -> u64 {
    42
}

/// A method by name, with the parameters for all models.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(into = "BTreeMap<String, Parameters>")]
pub struct MethodConfig {
    /// Name of the method, as in [`crate::METHODS`] or a [`crate::MethodRegistry`].
    pub name: String,
    /// Parameters.
    pub parameters: Parameters,
}

impl<'de> Deserialize<'de> for MethodConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MethodConfig, D::Error> {
        deserializer.deserialize_any(MethodVisitor)
    }
}

/// Accepts a name alone, or a table with one name and its parameters.
struct MethodVisitor;

impl<'de> Visitor<'de> for MethodVisitor {
    type Value = MethodConfig;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the name of a method, or one table [method.NAME] of its parameters")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<MethodConfig, E> {
        Ok(MethodConfig { name: name.to_owned(), parameters: Parameters::default() })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MethodConfig, A::Error> {
        let wrong = |what: &str| serde::de::Error::custom(format!("`method` must name exactly one method, not {what}"));
        let Some((name, parameters)) = map.next_entry()? else { return Err(wrong("none")) };
        match map.next_key::<String>()? {
            None => Ok(MethodConfig { name, parameters }),
            Some(other) => Err(wrong(&format!("`{name}` and `{other}`"))),
        }
    }
}

impl From<MethodConfig> for BTreeMap<String, Parameters> {
    fn from(method: MethodConfig) -> BTreeMap<String, Parameters> {
        BTreeMap::from([(method.name, method.parameters)])
    }
}

/// A model and its own parameters: a table, or only the model as a text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct ModelConfig {
    /// Model directory, Hub name, or the name of an earlier stage; `model+adapter` is a model with a PEFT adapter
    /// folded in.
    pub model: String,
    /// Key of its random masks; by default the path as written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Parameters of the model.
    #[serde(flatten)]
    pub parameters: Parameters,
}

impl Serialize for ModelConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        ModelConfig::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ModelConfig, D::Error> {
        struct TableOrText;
        impl<'de> Visitor<'de> for TableOrText {
            type Value = ModelConfig;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a model, or a table such as { model = \"…\", weight = 0.5 }")
            }

            fn visit_str<E: serde::de::Error>(self, model: &str) -> Result<ModelConfig, E> {
                Ok(ModelConfig { model: model.to_owned(), ..ModelConfig::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ModelConfig, A::Error> {
                ModelConfig::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(TableOrText)
    }
}

/// Layers of the output, merged from the same number of layers of every source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SliceConfig {
    /// The sources.
    pub sources: Vec<SliceSource>,
    /// Another base for these layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Parameters of these layers.
    #[serde(flatten)]
    pub parameters: Parameters,
}

/// A range of layers of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SliceSource {
    /// Model directory, or the name of an earlier stage.
    pub model: String,
    /// First layer and one after the last.
    pub layer_range: [usize; 2],
    /// Parameters of these layers of this model.
    #[serde(flatten)]
    pub parameters: Parameters,
}

/// Policy for embedding rows that not all models have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vocabulary {
    /// Error.
    #[default]
    Error,
    /// The output has only the rows that all models have.
    Common,
    /// The output has the base's rows; those that some model lacks are copied from the base.
    Base,
    /// The output has all rows; those that some model lacks are the mean over the models that have them.
    Keep,
}

/// Policy for tensors that not all inputs have. Buffers determined by config.json, such as rotary frequencies, are
/// ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExtraTensors {
    /// Error.
    #[default]
    Error,
    /// The output has the base's tensors (the first model's without a base); those that some model lacks are copied
    /// from it.
    Base,
    /// The output has all tensors; those that some model lacks are copied from the first model that has them.
    Union,
}

impl ExtraTensors {
    fn is_default(&self) -> bool {
        *self == ExtraTensors::Error
    }
}

/// Dtype of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FloatType {
    /// 32 bits.
    #[serde(rename = "float32", alias = "f32")]
    Float32,
    /// 16 bits, with a 5-bit exponent.
    #[serde(rename = "float16", alias = "f16")]
    Float16,
    /// 16 bits, with an 8-bit exponent.
    #[serde(rename = "bfloat16", alias = "bf16")]
    Bfloat16,
}

impl FloatType {
    /// Returns the dtype as in a safetensors header.
    pub fn dtype(self) -> cl_checkpoint::Dtype {
        match self {
            FloatType::Float32 => cl_checkpoint::Dtype::F32,
            FloatType::Float16 => cl_checkpoint::Dtype::F16,
            FloatType::Bfloat16 => cl_checkpoint::Dtype::BF16,
        }
    }
}

fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    let flag = Option::<Flag>::deserialize(deserializer)?;
    flag.map(|flag| flag.value().map_err(serde::de::Error::custom)).transpose()
}

/// Parameters of methods; which ones a method has, and their meaning, is in [`crate::METHODS`] and
/// [`crate::PARAMETERS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Parameters {
    /// Weight of the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<Parameter>,
    /// Fraction of a task vector's entries to keep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<Parameter>,
    /// Fraction of a task vector's largest entries to drop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<Parameter>,
    /// Half of the range of DELLA's probabilities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<Parameter>,
    /// Scale of the merged task vector.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lambda: Option<Parameter>,
    /// Interpolation between two models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub t: Option<Parameter>,
    /// Factor applied to a tensor that is passed through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<Parameter>,
    /// Fraction of entries to select, those with the highest variance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select_topk: Option<Parameter>,
    /// Threshold of a task's mask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_threshold: Option<Parameter>,
    /// Fraction of the sum of singular values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<Parameter>,
    /// Fraction of a matrix's rank that each task keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_share: Option<Parameter>,
    /// Fraction of directions that the sum keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub common_share: Option<Parameter>,
    /// Minimum number of tasks whose masks contain an entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_agree: Option<usize>,
    /// Maximum number of iterations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_iter: Option<usize>,
    /// Tolerance of convergence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tol: Option<f64>,
    /// Smallest norm, against division by zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Whether to divide by the sum of weights.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flag")]
    pub normalize: Option<bool>,
    /// Whether to normalize weights to a sum of 1.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flag")]
    pub normalize_weights: Option<bool>,
    /// Whether to use one ratio per row.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flag")]
    pub filter_wise: Option<bool>,
    /// Whether to interpolate columns instead of rows, if not flattened.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flag")]
    pub nuslerp_row_wise: Option<bool>,
    /// Whether to treat each tensor as one vector.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flag")]
    pub nuslerp_flatten: Option<bool>,
    /// No effect: sums are in f32, and masks are not stored.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flag")]
    pub int8_mask: Option<bool>,
    /// Compensation for dropped entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rescale: Option<Rescale>,
    /// Scope of trimming.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trim: Option<Trimmed>,
    /// Election of an entry's sign.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub election: Option<Election>,
    /// Divisor of a sum of task vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divisor: Option<Divisor>,
    /// Whether to trim scaled singular vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaled: Option<bool>,
    /// Component of a new task vector to remove.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projection: Option<Projection>,
    /// Scope of the norms for scaling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norms: Option<Trimmed>,
    /// Model whose mask is used instead of the consensus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only: Option<String>,
    /// Earlier merge to continue from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// All other keys: those of methods that are not built in, and unknown keys, which are reported when the merge is
    /// planned.
    #[serde(flatten, skip_serializing_if = "BTreeMap::is_empty")]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// Splits `model+adapter`, mergekit's notation for a model with an adapter. If a directory with the whole name exists,
/// the name is not split.
pub(crate) fn model_and_adapter(written: &str) -> (&str, Option<&str>) {
    match written.split_once('+') {
        Some((model, adapter)) if !model.is_empty() && !adapter.is_empty() && !Path::new(written).exists() => {
            (model, Some(adapter))
        }
        _ => (written, None),
    }
}

impl MergeConfig {
    /// Returns all models that the file names, each once, in order.
    pub(crate) fn written_models(&self) -> Vec<&str> {
        let sources = self.slices.iter().flat_map(|s| {
            let sources = s.sources.iter().map(|source| source.model.as_str());
            s.base_model.as_deref().into_iter().chain(sources)
        });
        let base = self.base_model.as_deref().into_iter();
        let previous = self.method.parameters.previous.as_deref().into_iter();
        let all = base.chain(previous).chain(self.models.iter().map(|m| m.model.as_str())).chain(sources);
        let mut seen = BTreeSet::new();
        all.filter(|model| seen.insert(*model)).collect()
    }
}

impl SliceConfig {
    /// Returns the number of layers that the slice contributes to the output.
    pub(crate) fn layers(&self) -> usize {
        self.sources.first().map_or(0, |s| s.layer_range[1].saturating_sub(s.layer_range[0]))
    }
}

impl Parameters {
    /// Removes a parameter by name; returns whether it was set.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        let Ok(serde_json::Value::Object(mut map)) = serde_json::to_value(&*self) else { return false };
        let removed = map.remove(name).is_some();
        match serde_json::from_value(map.into()) {
            Ok(others) if removed => *self = others,
            _ => return false,
        }
        true
    }

    /// Returns the names of the parameters that are set.
    pub fn names(&self) -> Vec<String> {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(map)) => map.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }
}
