//! Reader for mergekit's YAML files. Keys that mergekit ignores are ignored with a note; other keys without a
//! counterpart here are reported as errors by name.

use std::collections::BTreeSet;
use std::fmt::Formatter;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::config::{
    ExtraTensors, FloatType, MergeConfig, MergeFile, MethodConfig, ModelConfig, Parameters, SliceConfig, SliceSource,
    Vocabulary,
};
use super::error::{ConfigError, MergekitProblem};
use super::tokenizer::{TokenConfig, TokenKind, TokenSource, TokenizerConfig, UNION};
use crate::methods::{MethodInfo, Profile};

/// One YAML document.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: Option<String>,
    merge_method: String,
    base_model: Option<Model>,
    models: Option<List<Entry<InputModel>>>,
    slices: Option<List<Entry<Slice>>>,
    modules: Option<Value>,
    parameters: Option<Entry<Parameters>>,
    dtype: Option<FloatType>,
    out_dtype: Option<FloatType>,
    tokenizer_source: Option<Model>,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<String>,
    random_seed: Option<u64>,
    // Keys that mergekit does not have.
    seed: Option<u64>,
    vocabulary: Option<Vocabulary>,
    extra_tensors: Option<ExtraTensors>,
    ignore_tokenizers: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InputModel {
    model: Model,
    layer_range: Option<Value>,
    parameters: Option<Entry<Parameters>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Slice {
    sources: List<Entry<Source>>,
    base_model: Option<Model>,
    residual_weight: Option<f64>,
    merge_method: Option<String>,
    parameters: Option<Entry<Parameters>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    model: Model,
    layer_range: [usize; 2],
    parameters: Option<Entry<Parameters>>,
}

/// A mapping. Errors show what it looks like in mergekit's YAML.
struct Entry<T>(T);

/// A list. Errors show what its entries look like in mergekit's YAML.
struct List<T>(Vec<T>);

/// An example of an entry, for error messages.
trait Described {
    const EXAMPLE: &'static str;
}

impl Described for InputModel {
    const EXAMPLE: &'static str = "a mapping such as `- model: NAME`";
}

impl Described for Slice {
    const EXAMPLE: &'static str = "a mapping such as `- sources: [{model: NAME, layer_range: [0, 16]}]`";
}

impl Described for Source {
    const EXAMPLE: &'static str = "a mapping such as `- {model: NAME, layer_range: [0, 16]}`";
}

impl Described for Parameters {
    const EXAMPLE: &'static str = "a mapping such as `weight: 0.5`";
}

impl<'de, T: Described + Deserialize<'de>> Deserialize<'de> for Entry<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntryVisitor(PhantomData))
    }
}

impl<'de, T: Described + Deserialize<'de>> Deserialize<'de> for List<Entry<T>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

struct EntryVisitor<T>(PhantomData<T>);

impl<'de, T: Described + Deserialize<'de>> Visitor<'de> for EntryVisitor<T> {
    type Value = Entry<T>;

    fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(T::EXAMPLE)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Entry)
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Described + Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
    type Value = List<Entry<T>>;

    fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "a list, of which each entry is {}", T::EXAMPLE)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<List<Entry<T>>, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element()? {
            list.push(entry);
        }
        Ok(List(list))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokenizer {
    source: Option<Model>,
    tokens: Option<Map<String, Value>>,
    pad_to_multiple_of: Option<usize>,
}

/// The settings of one token.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    source: Option<TokenRow>,
    #[serde(default)]
    force: bool,
}

/// The source of a row: `{kind: model_token, …}`, `{kind: zero}`, or a model.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "source: expected a model, {kind: zero}, or {kind: model_token, model, token or token_id}"
)]
enum TokenRow {
    ModelToken {
        #[serde(rename = "kind")]
        _kind: ModelTokenKind,
        model: Model,
        token: Option<String>,
        token_id: Option<usize>,
    },
    Zero {
        #[serde(rename = "kind")]
        _kind: ZeroKind,
    },
    Model(Model),
}

#[derive(Deserialize)]
enum ModelTokenKind {
    #[serde(rename = "model_token")]
    ModelToken,
}

#[derive(Deserialize)]
enum ZeroKind {
    #[serde(rename = "zero")]
    Zero,
}

/// Parameters of mergekit's methods, and parameters that published files set for every method. mergekit ignores those
/// that the method of the file does not have.
const KNOWN: [&str; 22] = [
    "alpha",
    "density",
    "dtype",
    "epsilon",
    "eps",
    "filter_wise",
    "gamma",
    "int8_mask",
    "lambda",
    "max_iter",
    "normalize",
    "normalize_weights",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "r",
    "rescale",
    "scale",
    "select_topk",
    "t",
    "tol",
    "weight",
    "window_size",
];

/// A model as a path, or in mergekit's long form.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected the path of a model")]
enum Model {
    Path(String),
    Long(LongModel),
}

#[derive(Deserialize)]
struct LongModel {
    model: LongPath,
    lora: Option<LongPath>,
    override_architecture: Option<Value>,
}

#[derive(Deserialize)]
struct LongPath {
    path: String,
    revision: Option<String>,
}

impl LongPath {
    /// Returns the model in mergekit's short form, with its revision.
    fn with_revision(self) -> String {
        self.revision.map_or(self.path.clone(), |revision| format!("{}@{revision}", self.path))
    }
}

/// Reads a merge file of one or several documents; later documents can refer to earlier ones by name.
pub(crate) fn from_yaml(text: &str) -> Result<MergeFile, ConfigError> {
    let documents: Vec<Document> = serde_saphyr::from_multiple(text)?;
    if documents.is_empty() {
        return Err(ConfigError::Empty);
    }
    let mut stages = Vec::new();
    let mut problems = Vec::new();
    for document in documents {
        stages.push(stage(document, &mut problems));
    }
    // The document without a name is the result.
    stages.sort_by_key(|stage: &MergeConfig| stage.name.is_none());
    if problems.is_empty() { Ok(MergeFile { stages }) } else { Err(ConfigError::Mergekit(problems)) }
}

fn entries<T>(list: Option<List<Entry<T>>>) -> Vec<T> {
    list.into_iter().flat_map(|list| list.0).map(|entry| entry.0).collect()
}

fn parameters(entry: Option<Entry<Parameters>>) -> Parameters {
    entry.map(|entry| entry.0).unwrap_or_default()
}

fn stage(document: Document, problems: &mut Vec<MergekitProblem>) -> MergeConfig {
    let mut refuse = |set: bool, what: &'static str| {
        if set {
            problems.push(MergekitProblem::NotSupported { what });
        }
    };
    refuse(document.modules.is_some(), "`modules`");
    let slices = entries(document.slices);
    refuse(slices.iter().any(|s| s.residual_weight.is_some()), "`residual_weight`");
    let mut path = |model: Model| match model {
        Model::Path(path) => path,
        Model::Long(long) => {
            refuse(long.override_architecture.is_some_and(|v| !v.is_null()), "`override_architecture`");
            match long.lora {
                None => long.model.with_revision(),
                Some(adapter) => format!("{}+{}", long.model.with_revision(), adapter.with_revision()),
            }
        }
    };
    let models = entries(document.models);
    let mut notes = Vec::new();
    if models.iter().any(|m| m.layer_range.is_some()) {
        notes.push(
            "`layer_range` has no effect under `models`; it selects layers under `sources` of `slices`".to_owned(),
        );
    }
    for method in slices.iter().filter_map(|s| s.merge_method.as_deref()) {
        if method != document.merge_method {
            let whole = &document.merge_method;
            notes.push(format!(
                "`merge_method: {method}` has no effect in a slice; the method of the file, {whole}, is used"
            ));
        }
    }
    let both = document.tokenizer.is_some() && document.tokenizer_source.is_some();
    let mut wrong: Vec<MergekitProblem> = Vec::new();
    let tokenizer = match (document.tokenizer, document.tokenizer_source) {
        (Some(tokenizer), _) => Some(tokenizer_config(tokenizer, &mut path, &mut wrong)),
        (None, Some(source)) => Some(TokenizerConfig { source: path(source), ..TokenizerConfig::default() }),
        (None, None) => None,
    };
    if both {
        wrong.push(MergekitProblem::TokenizerTwice);
    }
    let config = MergeConfig {
        name: document.name,
        profile: Profile::Mergekit,
        base_model: document.base_model.map(&mut path),
        models: models
            .into_iter()
            .map(|m| ModelConfig { model: path(m.model), name: None, parameters: parameters(m.parameters) })
            .collect(),
        slices: slices
            .into_iter()
            .map(|s| SliceConfig {
                sources: entries(Some(s.sources))
                    .into_iter()
                    .map(|source| SliceSource {
                        model: path(source.model),
                        layer_range: source.layer_range,
                        parameters: parameters(source.parameters),
                    })
                    .collect(),
                base_model: s.base_model.map(&mut path),
                parameters: parameters(s.parameters),
            })
            .collect(),
        method: MethodConfig { name: document.merge_method, parameters: parameters(document.parameters) },
        dtype: document.out_dtype.or(document.dtype),
        seed: document.seed.or(document.random_seed).unwrap_or(42),
        tokenizer,
        chat_template: document.chat_template,
        vocabulary: document.vocabulary.unwrap_or_default(),
        extra_tensors: document.extra_tensors.unwrap_or_default(),
        tokenizer_source: None,
        ignore_tokenizers: document.ignore_tokenizers.unwrap_or_default(),
        revisions: Default::default(),
        places: Default::default(),
        ignore_parameters_of_others: true,
        notes,
    };
    problems.extend(wrong);
    config
}

/// Drops parameters that only other methods of mergekit have, as mergekit ignores them; adds one note for each.
pub(crate) fn drop_parameters_of_others(config: &mut MergeConfig, method: &MethodInfo) {
    let slices = config.slices.iter_mut().flat_map(|slice| {
        let sources = slice.sources.iter_mut().map(|source| (&mut source.parameters, true));
        sources.chain([(&mut slice.parameters, false)])
    });
    let models = config.models.iter_mut().map(|model| (&mut model.parameters, true));
    let all = std::iter::once((&mut config.method.parameters, false)).chain(models).chain(slices);
    let mut dropped: BTreeSet<&str> = BTreeSet::new();
    for (parameters, of_model) in all {
        // This parameter has no effect with any method.
        let no_effect = |known: &str| of_model && known == "int8_mask";
        let others = KNOWN.iter().filter(|known| method.parameter(known).is_none() || no_effect(known));
        dropped.extend(others.filter(|known| parameters.remove(known)));
    }
    config.notes.extend(dropped.into_iter().map(|dropped| format!("`{dropped}` has no effect with {}", method.name)));
}

/// Converts the long form of the tokenizer settings, with the sources of tokens and individual rows.
fn tokenizer_config(
    tokenizer: Tokenizer,
    path: &mut impl FnMut(Model) -> String,
    problems: &mut Vec<MergekitProblem>,
) -> TokenizerConfig {
    let mut tokens = Vec::new();
    for (token, settings) in tokenizer.tokens.unwrap_or_default() {
        match serde_json::from_value::<Token>(settings) {
            Ok(settings) => {
                let source = settings.source.map(|source| match source {
                    TokenRow::Zero { .. } => TokenSource::Kind(TokenKind::Zero),
                    TokenRow::ModelToken { model, token, token_id, .. } => {
                        TokenSource::Kind(TokenKind::ModelToken { model: path(model), token, token_id })
                    }
                    TokenRow::Model(model) => TokenSource::Model(path(model)),
                });
                tokens.push(TokenConfig { token, source, force: settings.force });
            }
            Err(source) => problems.push(MergekitProblem::Token { token, source }),
        }
    }
    TokenizerConfig {
        source: tokenizer.source.map_or_else(|| UNION.to_owned(), path),
        pad_to_multiple_of: tokenizer.pad_to_multiple_of,
        tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::parameter::Parameter;

    #[test]
    fn a_typical_file_is_read_as_it_is() {
        let text = "
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
";
        let file = from_yaml(text).unwrap();
        let stage = &file.stages[0];
        assert_eq!((stage.method.name.as_str(), stage.profile), ("slerp", Profile::Mergekit));
        assert_eq!(stage.slices[0].sources[1].layer_range, [0, 40]);
        assert_eq!(stage.dtype, Some(FloatType::Float16));
        let t = stage.method.parameters.t.as_ref().unwrap();
        assert_eq!(t.resolve("model.layers.20.self_attn.q_proj.weight", 0.25), Some(0.5));
        assert_eq!(t.resolve("model.layers.20.mlp.up_proj.weight", 0.0), Some(1.0));
        assert_eq!(t.resolve("model.norm.weight", 0.0), Some(0.5));
    }

    #[test]
    fn stages_booleans_long_models_and_the_base_tokenizer() {
        let text = "
name: first
merge_method: dare_ties
base_model: {model: {path: base}}
tokenizer_source: base
models:
  - model: base
  - model: a
    parameters: {weight: 0.5, density: 0.53}
parameters: {rescale: true, int8_mask: true, normalize: false}
---
merge_method: linear
models:
  - model: first
    parameters: {weight: 1}
out_dtype: bfloat16
dtype: float32
";
        let file = from_yaml(text).unwrap();
        assert_eq!(file.stages[0].base_model.as_deref(), Some("base"));
        assert_eq!(file.stages[0].tokenizer.as_ref().unwrap().source, "base");
        assert_eq!(file.stages[0].models[1].parameters.weight, Some(Parameter::Number(0.5)));
        assert_eq!(file.stages[0].method.parameters.rescale, Some(crate::methods::Rescale::Norm));
        assert_eq!(file.stages[1].dtype, Some(FloatType::Bfloat16));
        assert_eq!(file.stages[1].name, None);
    }

    #[test]
    fn one_and_zero_are_booleans() {
        let text = |flag: &str| {
            format!(
                "merge_method: ties\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {{normalize: {flag}, int8_mask: 1.0}}\n"
            )
        };
        let rescaled = |flag: &str| from_yaml(&text("1").replace("normalize: 1", &format!("rescale: {flag}")));
        for (flag, expected) in
            [("1.0", true), ("1", true), ("0", false), ("0.0", false), ("true", true), ("false", false)]
        {
            let parameters = from_yaml(&text(flag)).unwrap().stages[0].method.parameters.clone();
            assert_eq!((parameters.normalize, parameters.int8_mask), (Some(expected), Some(true)), "{flag}");
            let rescale = if expected { crate::methods::Rescale::Norm } else { crate::methods::Rescale::None };
            assert_eq!(rescaled(flag).unwrap().stages[0].method.parameters.rescale, Some(rescale), "{flag}");
        }
        for flag in ["0.5", "2", "[1]", "x"] {
            let message = from_yaml(&text(flag)).unwrap_err().to_string();
            assert!(message.contains("true or false"), "{flag}: {message}");
        }
        for (flag, part) in [("0.5", "expected true or false, got 0.5"), ("x", "\"density\""), ("[1]", "\"density\"")] {
            let message = rescaled(flag).unwrap_err().to_string();
            assert!(message.contains(part), "{flag}: {message}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let text = "
merge_method: linear
models: [{model: {model: {path: a}, override_architecture: B}}]
modules: {text_decoder: {}}
tokenizer: {tokens: {<a>: {source: {kind: one}}}}
tokenizer_source: base
";
        let message = from_yaml(text).unwrap_err().to_string();
        for part in ["override_architecture", "modules", "`<a>`", "either `tokenizer_source` or `tokenizer`"] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
        assert!(from_yaml("merge_method: linear\nmodell: []\n").unwrap_err().to_string().contains("modell"));
        assert!(from_yaml("a: [").is_err() && from_yaml("").is_err());
    }
}
